"""Compares torch, peft and bitsandbytes before and after a distributed run: `python -m tests.dist_workers.patched`.

A process of its own, since it must see the libraries before anything of the project is imported.
"""

from __future__ import annotations

import builtins
import importlib
import importlib.util
import inspect
import json
import os
import pkgutil
import sys
import traceback
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.processes import free_port, rank_environment

LIBRARIES = ("torch", "peft", "bitsandbytes")
PACKAGES = ("quant", "models", "parallel", "train")
# Imported before the comparison, so that they are compared; importing adds names to the packages that they are in.
SUBMODULES = (
    "torch.nn.functional",
    "torch.optim.lr_scheduler",
    "torch.profiler",
    "torch.utils.checkpoint",
    "torch.utils.data",
    "torch.distributed.checkpoint",
    "torch.distributed.checkpoint.state_dict",
    "torch.distributed.device_mesh",
    "torch.distributed.elastic.multiprocessing.errors",
    "torch.distributed.fsdp",
    "torch.distributed.nn.functional",
    "torch.distributed.tensor",
    "torch.distributed.tensor.parallel",
    "peft",
    "peft.tuners.lora",
    "bitsandbytes",
    "bitsandbytes.functional",
    "bitsandbytes.nn",
    "bitsandbytes.optim",
)
HOOKS = ("_global_forward_hooks", "_global_forward_pre_hooks", "_global_backward_hooks", "_global_backward_pre_hooks")

Snapshot = dict[str, tuple[Any, Any]]


def of_library(name: str | None) -> bool:
    return name is not None and name.partition(".")[0] in LIBRARIES


def code_of(thing: Any) -> Any:
    """What a function runs, beyond which function it is."""
    thing = inspect.unwrap(thing) if callable(thing) else thing
    return (getattr(thing, "__code__", None), getattr(thing, "__defaults__", None))


def snapshot() -> Snapshot:
    """Every function, class and method of the libraries' modules, by dotted name, and what it runs; and what decides
    how modules are imported."""
    found: Snapshot = {}
    classes: dict[int, type] = {}
    for name, module in sorted(sys.modules.items()):
        if not of_library(name) or not isinstance(module, types.ModuleType):
            continue
        found[name] = (module, getattr(module, "__file__", None))
        for attribute, value in list(vars(module).items()):
            if attribute.startswith("_") and not attribute.startswith("__"):
                continue  # torch fills some of its private names when they are first needed
            if isinstance(value, type):
                found[f"{name}.{attribute}"] = (value, value.__bases__)
                if of_library(value.__module__):
                    classes[id(value)] = value
            elif callable(value) and not isinstance(value, types.ModuleType):
                found[f"{name}.{attribute}"] = (value, code_of(value))
    for of_class in classes.values():
        for attribute, value in list(vars(of_class).items()):
            if callable(value) or isinstance(value, property | staticmethod | classmethod):
                function = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
                where = f"{of_class.__module__}.{of_class.__qualname__}#{id(of_class)}.{attribute}"
                found[where] = (value, code_of(function))
    found["builtins.__import__"] = (builtins.__import__, None)
    for number, finder in enumerate(sys.meta_path):
        found[f"sys.meta_path[{number}]"] = (finder, None)
    return found


def differences(before: Snapshot, after: Snapshot) -> list[str]:
    """What another object or other code stands for now, what is gone, and names that are new in modules and classes
    that were there before."""
    wrong = []
    for name, (thing, code) in before.items():
        if name not in after:
            wrong.append(f"{name} is gone")
        elif after[name][0] is not thing:
            wrong.append(f"{name} is another object")
        elif not same_code(after[name][1], code):
            wrong.append(f"{name} has other code")
    for name in after.keys() - before.keys():
        owner = name.rpartition(".")[0]
        is_module = isinstance(after[name][0], types.ModuleType)
        if not is_module and (owner in before or any(key.startswith(f"{owner}.") for key in before)):
            wrong.append(f"{name} is new")
    return sorted(wrong)


def same_code(ours: Any, theirs: Any) -> bool:
    if isinstance(ours, tuple) and isinstance(theirs, tuple):
        return len(ours) == len(theirs) and all(map(same_code, ours, theirs))
    return ours is theirs or (isinstance(ours, str) and ours == theirs)


def files() -> dict[str, tuple[int, int]]:
    """Size and time of the source of every module of the libraries that is loaded."""
    found = {}
    for name, module in list(sys.modules.items()):
        path = getattr(module, "__file__", None) if of_library(name) else None
        if path is not None and Path(path).is_file():
            status = Path(path).stat()
            found[path] = (status.st_size, status.st_mtime_ns)
    return found


def hooks() -> dict[str, int]:
    """Hooks on all modules that there are or will be."""
    module = sys.modules["torch.nn.modules.module"]
    return {name: len(getattr(module, name)) for name in HOOKS}


def all_modules() -> Iterator[str]:
    """But the one whose class is made of lm-eval's, which is an extra."""
    lacking = set() if importlib.util.find_spec("lm_eval") else {"train.evaluate.harness_model"}
    for package in PACKAGES:
        imported = importlib.import_module(package)
        yield package
        for found in pkgutil.walk_packages(imported.__path__, f"{package}."):
            if found.name not in lacking:
                yield found.name


def main(arguments: list[str], meddle: str, result: str) -> int:
    """Look at the libraries; then three processes, forked from this one, go on: two train together as `python -m train`
    with `arguments` does, the third executes `meddle` and trains nothing. Each writes what has changed to `result`.
    """
    for name in SUBMODULES:
        importlib.import_module(name)
    torch = sys.modules["torch"]
    torch.optim.AdamW([torch.zeros(1)])  # torch itself wraps the class's step when the first one is made
    found = {"early": [name for name in sys.modules if name.partition(".")[0] in PACKAGES]}
    before, sources, hooked = snapshot(), files(), hooks()
    found["compared"] = len(before)

    def compare(given: list[str], number: int) -> None:
        for name in all_modules():
            importlib.import_module(name)
        found["code"] = importlib.import_module("train.__main__").main(given)
        wrong = differences(before, snapshot())
        wrong += [f"{path} was written" for path, status in files().items() if sources.get(path, status) != status]
        wrong += [f"{name} has {count} more" for name, count in hooks().items() if count != hooked[name]]
        Path(f"{result}-{number}.json").write_text(json.dumps({**found, "wrong": wrong}), encoding="utf-8")

    port = free_port()
    children = []
    for number in range(3):
        if (child := os.fork()) == 0:
            code = 1
            try:
                if number < 2:
                    os.environ.update(rank_environment(number, 2, port))
                    compare(arguments, number)
                else:
                    exec(meddle)  # noqa: S102 - a test's own lines, so that the comparison is seen to fail
                    compare(["--print-schema"], number)
                code = 0
            except BaseException:  # noqa: BLE001  the process ends here
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(code)
        children.append(child)
    return max(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 0 for child in children)


if __name__ == "__main__":
    sys.exit(main(*[json.loads(sys.argv[1]), *sys.argv[2:]]))
