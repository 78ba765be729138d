"""llama.cpp's converters and its library, each job in a fork of one process that has imported what they need.

    python tests/servers/llamacpp_worker.py LLAMA_CPP < jobs.json        LLAMA_CPP: its source

A job is {"do": "convert" | "lora" | "logits", …}; the last line printed is the list of what each gave: "" or the end
of its output where it failed.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import runpy
import sys
import tempfile
import traceback
import types
from pathlib import Path
from typing import Any

SOURCE = Path(sys.argv[1]) if len(sys.argv) > 1 else Path()
os.environ["NO_LOCAL_GGUF"] = "1"
sys.path[:0] = [str(SOURCE / "gguf-py"), str(SOURCE)]

import conversion.base  # noqa: E402
import numpy as np  # noqa: E402
import transformers  # noqa: E402, F401 - for the forks

FLASH_OFF, FLOAT32 = 0, 0


def convert(job: dict[str, Any]) -> None:
    """A folder in the hub's format to a float32 GGUF. pre: the tokenizer's kind, which a tiny one doesn't show."""
    conversion.base.TextModel.get_vocab_base_pre = lambda self, tokenizer: job["pre"]
    script("convert_hf_to_gguf.py", job["folder"], "--outfile", job["out"], "--outtype", "f32", *job.get("options", ()))


def lora(job: dict[str, Any]) -> None:
    script("convert_lora_to_gguf.py", job["adapter"], "--base", job["base"], "--outfile", job["out"])


def script(name: str, *arguments: str) -> None:
    sys.argv = [name, *arguments]
    runpy.run_path(str(SOURCE / name), run_name="__main__")


def logits(job: dict[str, Any]) -> None:
    """Of every position of one prompt: float32 [T, V] as .npy. lora: a GGUF, or None."""
    # The package's file alone: its own __init__ imports much more.
    package = types.ModuleType("llama_cpp")
    package.__path__ = [str(SOURCE.parent.parent / "llama_cpp")]
    sys.modules["llama_cpp"] = package
    import llama_cpp.llama_cpp as cpp

    cpp.llama_backend_init()
    settings = cpp.llama_model_default_params()
    settings.n_gpu_layers = 0
    model = cpp.llama_model_load_from_file(job["model"].encode(), settings)
    assert model, "the model can't be loaded"
    options = cpp.llama_context_default_params()
    options.n_ctx = options.n_batch = options.n_ubatch = 256
    options.n_threads = options.n_threads_batch = 1
    options.flash_attn_type, options.type_k, options.type_v = FLASH_OFF, FLOAT32, FLOAT32
    context = cpp.llama_init_from_model(model, options)
    assert context, "there is no context"
    if job.get("lora"):
        adapter = cpp.llama_adapter_lora_init(model, job["lora"].encode())
        assert adapter, "the adapter can't be loaded"
        adapters, scales = (cpp.llama_adapter_lora_p_ctypes * 1)(adapter), (ctypes.c_float * 1)(1.0)
        assert cpp.llama_set_adapters_lora(context, adapters, 1, scales) == 0
    tokens = job["tokens"]
    batch = cpp.llama_batch_init(len(tokens), 0, 1)
    batch.n_tokens = len(tokens)
    for index, token in enumerate(tokens):
        batch.token[index], batch.pos[index], batch.n_seq_id[index] = token, index, 1
        batch.seq_id[index][0], batch.logits[index] = 0, 1
    assert cpp.llama_decode(context, batch) == 0, "decoding failed"
    size = cpp.llama_vocab_n_tokens(cpp.llama_model_get_vocab(model))
    found = np.ctypeslib.as_array(cpp.llama_get_logits(context), shape=(len(tokens) * size,))
    np.save(job["out"], found.reshape(len(tokens), size))


def forked(job: dict[str, Any]) -> str:
    """The end of what a job printed, where it failed; it may also have aborted."""
    with tempfile.TemporaryFile() as output:
        child = os.fork()
        if child == 0:
            code = 1
            try:
                os.dup2(output.fileno(), 1)
                os.dup2(output.fileno(), 2)
                with contextlib.suppress(SystemExit):
                    {"convert": convert, "lora": lora, "logits": logits}[job["do"]](job)
                code = 0 if Path(job["out"]).is_file() else 1
            except BaseException:  # noqa: BLE001 - whatever it is, it is what the job gave
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        _, status = os.waitpid(child, 0)
        output.seek(0)
        text = output.read().decode(errors="replace")
    return "" if status == 0 else f"{job['do']} failed: {text[-3000:]}"


if __name__ == "__main__":
    print(json.dumps([forked(job) for job in json.load(sys.stdin)]))
