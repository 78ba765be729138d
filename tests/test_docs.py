"""The rules of the code and the promises of the documentation, as far as they can be checked mechanically."""

from __future__ import annotations

import ast
import re
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.processes import LIMIT
from train.config.load import config_schema, load_config
from train.config.schema import keys
from train.demo.models import MODELS

ROOT = Path(__file__).parent.parent
FLOORS = ("quant", "models", "parallel", "train")  # imports go from right to left
PACKAGES = (*FLOORS, "benchmarks")
SOURCES = sorted(path for package in FLOORS for path in (ROOT / package).rglob("*.py"))
EVERY_FILE = sorted(path for folder in (*PACKAGES, "tests") for path in (ROOT / folder).rglob("*.py"))
TEXTS = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted(ROOT.glob("docs/*.md")),
    *sorted(ROOT.glob("benchmarks/*.md")),
]
# Slow to import, so they are imported in the function that needs them.
SLOW = {"bitsandbytes", "fla", "matplotlib", "tensorboard", "pyarrow", "huggingface_hub"}
# Tests are lists of cases, so theirs may be longer.
MOST_LINES, MOST_TEST_LINES = 450, 700


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def imported(node: ast.AST) -> Iterator[str]:
    """The dotted names that an import statement names; relative ones, which stay in their package, are left out."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
        yield node.module


def dotted(node: ast.expr) -> str:
    """`torch.load` of the expression torch.load; "" of anything that isn't a dotted name."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        owner = dotted(node.value)
        return f"{owner}.{node.attr}" if owner else ""
    return ""


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_imports_only_go_down(path: Path) -> None:
    above = FLOORS[FLOORS.index(path.relative_to(ROOT).parts[0]) + 1 :]
    for node in ast.walk(tree_of(path)):
        for name in imported(node):
            top = name.split(".")[0]
            assert top not in above, f"{name_of(path)}:{getattr(node, 'lineno', 0)} imports {name}, a floor above it"
            assert top not in ("transformers", "peft", "tests", "benchmarks"), f"{name_of(path)} imports {name}"


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_slow_libraries_are_imported_where_they_are_used(path: Path) -> None:
    for node in tree_of(path).body:
        for name in imported(node):
            assert name.split(".")[0] not in SLOW, f"{name_of(path)} imports {name} at its top"


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_nothing_is_executed_or_unpickled(path: Path) -> None:
    forbidden = {"exec", "eval", "compile", "__import__", "torch.save", "torch.load"}
    for node in ast.walk(tree_of(path)):
        for name in imported(node):
            assert name.split(".")[0] not in {"pickle", "dill", "cloudpickle", "marshal", "shelve"}, name_of(path)
        if isinstance(node, ast.Call):
            called = dotted(node.func)
            assert called not in forbidden, f"{name_of(path)}:{node.lineno} calls {called}"


@pytest.mark.parametrize("path", EVERY_FILE, ids=name_of)
def test_no_file_is_long(path: Path) -> None:
    lines = len(path.read_text(encoding="utf-8").splitlines())
    most = MOST_TEST_LINES if "tests" in path.relative_to(ROOT).parts else MOST_LINES
    assert lines <= most, f"{name_of(path)} has {lines} lines: look for the second subject in it"


@pytest.mark.parametrize("path", TEXTS, ids=name_of)
def test_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (path.parent / target.split("#")[0]).exists(), f"{name_of(path)} links to {target}"


def commands_in(path: Path) -> list[str]:
    """The `python -m …` commands that a text names, in order, without line continuations."""
    text = path.read_text(encoding="utf-8").replace("\\\n", " ")
    return [" ".join(found.split()) for found in re.findall(r"\bpython -m [^\n`]*", text)]


@pytest.mark.parametrize("path", TEXTS, ids=name_of)
def test_commands_name_modules_and_files_that_exist(path: Path) -> None:
    for command in commands_in(path):
        module = re.sub(r"[^\w.].*", "", command.removeprefix("python -m ")).rstrip(".").replace(".", "/")
        assert (ROOT / f"{module}.py").is_file() or (ROOT / module / "__main__.py").is_file(), command
        for config in re.findall(r"configs/\S+\.yaml", command):
            assert (ROOT / config).is_file(), command


def made(*arguments: str) -> subprocess.CompletedProcess[str]:
    """What make would run, of a checkout where everything is installed."""
    command = ["make", "--no-print-directory", "--dry-run", "--old-file=.venv/.installed", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=LIMIT, check=False)


def demo_commands(*arguments: str) -> list[str]:
    shown = made("demo", *arguments)
    assert shown.returncode == 0, shown.stderr
    return [line.replace(".venv/bin/python", "python") for line in shown.stdout.splitlines()]


def test_make_demo_is_what_the_readme_says_one_by_one() -> None:
    commands, named = demo_commands(), commands_in(ROOT / "README.md")
    start = named.index(commands[0])
    assert named[start : start + len(commands)] == commands


@pytest.mark.parametrize("model_type", MODELS)
def test_make_demo_has_each_architecture_in_a_folder_of_its_own(model_type: str) -> None:
    folder = "outputs/demo" if model_type == "glm4_moe_lite" else f"outputs/demo-{model_type}"
    prepare, pretrain, convert, qlora, report, before, after = demo_commands(f"ARCH={model_type}")
    assert prepare == f"python -m train.demo prepare {folder} --arch {model_type}"
    assert convert == f"python -m models.convert {folder}/base/model {folder}/base-nf4 --storage nf4"
    assert report == f"python -m train.demo report {folder}"
    generate, question = f"python -m train.generate {folder}/base-nf4", before.partition("--prompt ")[2]
    assert before == f"{generate} --prompt {question}"
    assert after == f"{generate} --adapter {folder}/qlora/adapter --prompt {question}"
    for command, run in ((pretrain, "base"), (qlora, "qlora")):
        config = load_config(ROOT / command.removeprefix("python -m train --config "))
        assert config.output.dir == f"{folder}/{run}"
    assert made("demo-clean", f"ARCH={model_type}").stdout == f"rm -rf {folder}\n"


@pytest.mark.parametrize("target", ["demo", "demo-clean"])
@pytest.mark.parametrize("arch", ["llama", "", "../.."])
def test_an_architecture_that_the_demo_does_not_have(target: str, arch: str) -> None:
    shown = made(target, f"ARCH={arch}")
    assert shown.returncode == 2
    assert shown.stdout == ""
    known = " ".join(sorted(MODELS))
    assert f"ARCH={arch} is no architecture of the demo. Choose one of: {known}." in shown.stderr


def test_the_worked_example_is_the_code() -> None:
    text = (ROOT / "docs" / "adding-a-model.md").read_text(encoding="utf-8")
    files = ("glm4_moe.py", "glm_moe.py", "registry.py")
    code = "".join((ROOT / "models" / name).read_text(encoding="utf-8") for name in files)
    quoted = re.findall(r"```python\n(.*?)```", text, re.S)
    assert len(quoted) > 4
    for block in quoted:
        assert block in code, block
    for name in re.findall(r"`(check_\w+)`", text):
        checks = (ROOT / "tests" / "architecture_checks.py").read_text(encoding="utf-8")
        assert f"def {name}(" in checks, name


def test_each_promise_of_security_has_its_test() -> None:
    named = re.findall(r"(tests/[\w/]+\.py)::(\w+)", (ROOT / "docs" / "security.md").read_text(encoding="utf-8"))
    assert len(named) > 15
    for file, test in named:
        assert re.search(rf"^def {test}\(", (ROOT / file).read_text(encoding="utf-8"), re.M), f"{file} has no {test}"


def test_each_block_of_the_table_is_in_its_file() -> None:
    text = (ROOT / "docs" / "adding-a-model.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (`.*?) \| \[\w+\.py\]\(\.\./(models/[\w/]+\.py)\)", text, re.M)
    assert len(rows) > 10
    for names, file in rows:
        source = (ROOT / file).read_text(encoding="utf-8")
        for name in re.findall(r"`(\w+)`", names):
            assert re.search(rf"^(class|def) {name}\b", source, re.M), f"{name} is not in {file}"


def test_every_target_of_the_makefile_is_explained() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    phony = re.search(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)
    assert phony is not None
    for target in phony[1].split():
        assert re.search(rf"^{target}:.*## \w", makefile, re.MULTILINE), target


def test_every_config_key_is_documented() -> None:
    text = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    for key in keys(config_schema()):
        assert f"`{key}`" in text, key
    for key in re.findall(r"`((?:model|adapter|data|train|parallel|output)\.\w+)`", text):
        assert key in keys(config_schema()), f"docs/configuration.md explains {key}, which doesn't exist"


def test_constraints_pin_every_dependency() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = {line.split("==")[0].lower().replace("_", "-") for line in lines if "==" in line}
    assert "torch==2.13.0" in lines
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    for requirement in wanted:
        name = re.split(r"[<>=!~\[; ]", requirement)[0].lower().replace("_", "-")
        assert name in pinned, f"constraints.txt does not pin {name}"
