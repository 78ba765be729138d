"""lm-eval's model class: its methods against transformers, and its results against lm-eval's own `hf` where that is
installed (`pip install -e '.[eval]'`), which `make setup` doesn't do.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from quant.common.errors import NibbleError
from tests.peft_helpers import peft_load, peft_make
from tests.run_helpers import World, make_world
from train.evaluate import harness

INSTALLED = importlib.util.find_spec("lm_eval") is not None
MODULE = "train.evaluate.harness_model"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def reference(world: World) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(world.model, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def adapter(reference: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter")
    peft_make(reference, folder, r=4, lora_alpha=8, target_modules=["o_proj"])
    return folder


@pytest.fixture
def model(world: World, adapter: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The class on the world's model with an adapter. Where lm-eval isn't installed, with stand-ins for what it is
    made of there.
    """
    if not INSTALLED:
        for name, contents in _stand_ins().items():
            module = ModuleType(name)
            vars(module).update(contents)
            monkeypatch.setitem(sys.modules, name, module)
        monkeypatch.delitem(sys.modules, MODULE, raising=False)
    made = importlib.import_module(MODULE).NibbleLM(
        str(world.model), storage="none", dtype="float32", device="cpu", adapter=str(adapter), batch_tokens=100
    )
    if not INSTALLED:
        monkeypatch.delitem(sys.modules, MODULE)
    return made


def _stand_ins() -> dict[str, dict[str, Any]]:
    class TemplateLM:
        def __init__(self) -> None:
            self.cache_hook = SimpleNamespace(add_partial=lambda *arguments: None)

    def windows(token_list: list[int], prefix_token: int, **rest: Any) -> list[tuple[list[int], list[int]]]:
        return [([prefix_token, *token_list[:-1]], token_list)]

    def cut(generation: str, stop: list[str], think_end_token: None) -> str:
        for text in stop:
            generation = generation.split(text)[0]
        return generation

    return {
        "lm_eval": {},
        "lm_eval.api": {},
        "lm_eval.api.model": {"TemplateLM": TemplateLM},
        "lm_eval.models": {},
        "lm_eval.models.utils": {
            "normalize_gen_kwargs": lambda options: {"do_sample": False, "temperature": 0.0, **options},
            "handle_stop_sequences": lambda until, eos: [*until, eos],
            "postprocess_generated_text": cut,
        },
        "lm_eval.utils": {
            "get_rolling_token_windows": windows,
            "make_disjoint_window": lambda window: (window[0][:1], window[1]),
        },
    }


def request(*arguments: Any) -> SimpleNamespace:
    return SimpleNamespace(args=arguments)


def test_log_likelihoods_equal_transformers(model: Any, reference: Any, adapter: Path) -> None:
    peft, _ = peft_load(reference, adapter)
    draw = torch.Generator().manual_seed(0)
    pairs = []
    for context, continuation in ((5, 1), (1, 7), (40, 3), (12, 30)):
        ids = torch.randint(6, 320, (context + continuation,), generator=draw).tolist()
        pairs.append((ids[:context], ids[context:]))
    with torch.no_grad():
        # A continuation that the model itself would give.
        likeliest = int(peft(input_ids=torch.tensor([pairs[0][0]])).logits[0, -1].argmax())
        pairs.append((pairs[0][0], [likeliest]))
        found = model._loglikelihood_tokens([(None, *pair) for pair in pairs])
        for (context, continuation), (value, greedy) in zip(pairs, found, strict=True):
            logits = peft(input_ids=torch.tensor([context + continuation])).logits[0, len(context) - 1 : -1]
            wanted = torch.tensor(continuation)
            expected = float(logits.log_softmax(-1).gather(1, wanted[:, None]).sum())
            assert value == pytest.approx(expected, rel=1e-5)
            assert greedy == bool((logits.argmax(-1) == wanted).all())
    assert found[-1][1] and not found[2][1]
    rolled = model.loglikelihood_rolling([request("add 1 and 2"), request("7")])
    with torch.no_grad():
        for text, value in zip(("add 1 and 2", "7"), rolled, strict=True):
            ids = torch.tensor([[model.prefix_token_id, *model.tok_encode(text)]])
            expected = peft(input_ids=ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None]).sum()
            assert value == pytest.approx(float(expected), rel=1e-5)


def test_texts_become_the_tokens_of_transformers(model: Any, world: World) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(world.model)
    for text in ("add 1 and 2", "<|user|>add", " = 3"):
        assert model.tok_encode(text) == tokenizer.encode(text)
    turns = [{"role": "user", "content": "add 1 and 2"}]
    assert model.apply_chat_template(turns) == tokenizer.apply_chat_template(
        turns, tokenize=False, add_generation_prompt=True
    )
    begun = [*turns, {"role": "assistant", "content": "1 2"}]
    assert model.apply_chat_template(begun, add_generation_prompt=False) == tokenizer.apply_chat_template(
        begun, tokenize=False, continue_final_message=True
    )
    assert model.eot_token_id == model.prefix_token_id == tokenizer.eos_token_id


def test_greedy_continuations(model: Any, reference: Any, adapter: Path, world: World) -> None:
    from transformers import AutoTokenizer

    peft, tokenizer = peft_load(reference, adapter)[0], AutoTokenizer.from_pretrained(world.model)
    texts = ["add 1 and 2", "add 1 and 2 and 7 and 4"]
    expected = []
    for text in texts:
        ids = torch.tensor([tokenizer.encode(text)])
        new = peft.generate(input_ids=ids, max_new_tokens=6, do_sample=False)[0, ids.shape[1] :]
        expected.append(tokenizer.decode(new, skip_special_tokens=True))
    options = {"until": [], "max_gen_toks": 6}
    assert model.generate_until([request(text, options) for text in texts]) == expected
    stop = expected[0][3:5]
    found = model.generate_until([request(texts[0], {"until": [stop], "max_gen_toks": 6})])
    assert found == [expected[0].split(stop)[0]]
    with pytest.raises(NibbleError, match="only greedy generation is offered"):
        model.generate_until([request("add", {**options, "do_sample": True, "temperature": 0.7})])


def test_a_prompt_that_does_not_fit(model: Any, caplog: pytest.LogCaptureFixture) -> None:
    """Its end is what counts; where nothing of it would be left it is refused."""
    text, options = "add 1 and 2 and 7 and 4", {"until": [], "max_gen_toks": 3}
    last = model.tok_encode(text)[-5:]
    model.max_length = 8
    assert model.generate_until([request(text, options)]) == model.generate_until(
        [request(model._tokens.decode(last), options)]
    )
    assert [record.getMessage() for record in caplog.records] == [
        "1 prompts are longer than max_length 8 less max_gen_toks: their beginning is left out."
    ]
    model.max_length = 3
    with pytest.raises(NibbleError, match="leaves nothing of max_length 3 for the prompt"):
        model.generate_until([request(text, options)])


def test_a_continuation_longer_than_the_model_s_context(model: Any) -> None:
    model.max_length = 4
    with pytest.raises(NibbleError, match="a continuation has 5 tokens, more than max_length 4"):
        model._loglikelihood_tokens([(None, [7], [8, 9, 10, 11, 12])])


@pytest.mark.skipif(INSTALLED, reason="lm-eval is installed")
def test_without_lm_eval_the_command_says_what_to_install(capsys: pytest.CaptureFixture[str]) -> None:
    assert harness.main() == 2
    assert "Install it: pip install 'nibble[eval]'" in capsys.readouterr().err


@pytest.mark.skipif(not INSTALLED, reason="lm-eval isn't installed: pip install -e '.[eval]'")
def test_results_equal_those_of_hf(
    world: World, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a local task of each kind, offline."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    harness.register()
    rows = [
        {"q": f"add {a} and {b}", "c": [f"{a} {b} = {a + b + d}" for d in (0, 1, 5)], "text": f"add {a} and {b}. " * a}
        for a, b in ((1, 2), (3, 5), (9, 4), (7, 7))
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    kinds = {
        "multiple_choice": 'doc_to_text: "{{q}}"\ndoc_to_target: 0\ndoc_to_choice: "{{c}}"\n',
        "loglikelihood_rolling": 'doc_to_text: ""\ndoc_to_target: "{{text}}"\n',
        "generate_until": (
            'doc_to_text: "{{q}}"\ndoc_to_target: "="\ngeneration_kwargs: {until: ["="], max_gen_toks: 8}\n'
        ),
    }
    for kind, rest in kinds.items():
        data = f"dataset_kwargs: {{data_files: {{test: {tmp_path}/rows.jsonl}}, cache_dir: {tmp_path}/cache}}\n"
        head = f"task: local_{kind}\ndataset_path: json\n{data}test_split: test\noutput_type: {kind}\n"
        (tmp_path / f"{kind}.yaml").write_text(head + rest)
    found = {}
    common = {"pretrained": str(world.model), "dtype": "float32"}
    for name, arguments in (
        ("nibble", {**common, "storage": "none", "adapter": str(adapter)}),
        ("hf", {**common, "peft": str(adapter)}),
    ):
        tasks = TaskManager(include_path=str(tmp_path), include_defaults=False)
        names = [f"local_{kind}" for kind in kinds]
        done = simple_evaluate(name, model_args=arguments, tasks=names, task_manager=tasks, device="cpu")
        found[name] = {
            task: [sample["resps"] for sample in sorted(samples, key=lambda sample: sample["doc_id"])]
            for task, samples in done["samples"].items()
        }
    ours, theirs = found["nibble"], found["hf"]
    for mine, other in zip(ours["local_multiple_choice"], theirs["local_multiple_choice"], strict=True):
        for (one,), (two,) in zip(mine, other, strict=True):
            assert float(one[0]) == pytest.approx(float(two[0]), abs=1e-4) and one[1] == two[1]
    for mine, other in zip(ours["local_loglikelihood_rolling"], theirs["local_loglikelihood_rolling"], strict=True):
        assert float(mine[0][0]) == pytest.approx(float(other[0][0]), rel=1e-6)
    assert ours["local_generate_until"] == theirs["local_generate_until"]
