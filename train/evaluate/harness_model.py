"""lm-eval's model class `nibble`: any storage, with an adapter, on one device.

model_args: pretrained (a checkpoint folder, a converted one, or a hub id), storage, double_quant, dtype, adapter,
layout, batch_tokens, max_length; device is lm-eval's --device. Texts become tokens as transformers' tokenizer makes
them, and windows and prefix are those of lm-eval's own `hf`, so that its results are too.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from models.adapters.packing import Packing
from models.checkpoint.side_files import CONFIG
from models.load import load_model, open_folder
from parallel.device import choose_device
from quant.common.errors import NibbleError
from quant.common.progress import Bar
from train.config.model_length import longest_context
from train.data.template_files import load_chat_template, missing_template
from train.data.tokenizer import load_tokenizer
from train.evaluate.scores import BATCH_TOKENS, score

log = logging.getLogger("nibble")

_LONGEST = 2048  # tokens, where neither model_args nor config.json says how long a text may be
_ROWS = 16  # generated together
_GREEDY = {"do_sample": False, "temperature": 0.0}


class NibbleLM(TemplateLM):
    """See the top of the file. batch_size, lm-eval's option, counts texts; batches are filled by tokens here."""

    def __init__(
        self,
        pretrained: str,
        storage: str | None = None,
        adapter: str | None = None,
        dtype: str | None = None,
        device: str | None = None,
        double_quant: bool | None = None,
        layout: Packing | None = None,
        batch_tokens: int = BATCH_TOKENS,
        max_length: int | None = None,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        if str(batch_size or 1) not in ("1", "auto"):
            log.warning(f"--batch_size {batch_size} isn't used: batches have model_args batch_tokens={batch_tokens}.")
        self._device = choose_device(device)
        source = open_folder(pretrained)
        kind, double, kept = source.stored(storage, double_quant, dtype)
        self.model = load_model(
            source.path, kind, kept, self._device, adapter, double_quant=double, layout=layout, progress=True
        )
        self._tokens = load_tokenizer(source.path)
        self._template = load_chat_template(source.path, self._tokens.special_tokens)
        self._folder, self._batch_tokens = source.path, batch_tokens
        self.max_length = max_length or longest_context(source.config, str(source.path / CONFIG)) or _LONGEST

    # --- tokens

    @property
    def eot_token_id(self) -> int:
        if self._tokens.eos_id is None:
            raise NibbleError(f"{self._folder}: no token that ends a text is known (eos_token, eos_token_id).")
        return self._tokens.eos_id

    @property
    def prefix_token_id(self) -> int:
        return self.eot_token_id if self._tokens.bos_id is None else self._tokens.bos_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        prefix, ids = list(self._tokens.document_prefix), self._tokens.encode(string)
        begun = add_special_tokens is None and ids[:1] == [self.prefix_token_id]
        return ids if begun or add_special_tokens is False else [*prefix, *ids]

    @property
    def tokenizer_name(self) -> str:
        return str(self._folder).replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        if self._template is None:
            raise missing_template(self._folder)
        if add_generation_prompt:
            return self._template.render(chat_history, add_generation_prompt=True)
        # An answer that has been begun: up to where it ends, without what ends it.
        text, last = self._template.render(chat_history), chat_history[-1]["content"]
        return text[: text.rindex(last.strip()) + len(last.strip())]

    # --- log-likelihoods

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[tuple[str, str] | None, list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Of each continuation the sum of its log-probabilities, and whether each of its tokens is the likeliest."""
        documents = []
        for _, context, continuation in requests:
            if len(continuation) > self.max_length:
                raise NibbleError(
                    f"a continuation has {len(continuation):,} tokens, more than max_length {self.max_length:,}."
                )
            ids = (context + continuation)[-(self.max_length + 1) :]
            documents.append((ids, [index >= len(ids) - len(continuation) for index in range(len(ids))]))
        cut = sum(len(context) + len(more) > self.max_length + 1 for _, context, more in requests)
        if cut:
            log.warning(f"{cut:,} texts are longer than max_length {self.max_length:,}: their beginning is left out.")
        with Bar("log-likelihoods") as bar:
            scores = score(self.model, documents, self._device, batch_tokens=self._batch_tokens, progress=bar.update)
        if not np.isfinite(scores.losses).all():
            raise NibbleError("a log-likelihood is no finite number: are checkpoint and adapter whole?")
        found = [
            (-float(loss), int(correct) == len(continuation))
            for loss, correct, (_, _, continuation) in zip(scores.losses, scores.correct, requests, strict=True)
        ]
        for (text, _, _), answer in zip(requests, found, strict=True):
            if text is not None:
                self.cache_hook.add_partial("loglikelihood", text, answer)
        return found

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        windows, counts = [], []
        for (text,) in (request.args for request in requests):
            rolling = get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            parts = [(None, *make_disjoint_window(window)) for window in rolling]
            windows += parts
            counts.append(len(parts))
        answers = iter(self._loglikelihood_tokens(windows))
        totals = [sum(next(answers)[0] for _ in range(count)) for count in counts]
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    # --- generation

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Greedy continuations, up to a token that ends a text or one of the texts `until`."""
        texts: list[str] = []
        with Bar("generating") as bar:
            for first in range(0, len(requests), _ROWS):
                bar.update(first, len(requests))
                texts += self._generate([request.args for request in requests[first : first + _ROWS]])
        for request, text in zip(requests, texts, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, text)
        return texts

    def _generate(self, requests: list[tuple[str, dict[str, Any]]]) -> list[str]:
        settings = [normalize_gen_kwargs(options) for _, options in requests]
        for one in settings:
            unused = {key: value for key, value in one.items() if key not in ("until", "max_gen_toks")}
            if any(key not in _GREEDY or value != _GREEDY[key] for key, value in unused.items()):
                raise NibbleError(f"only greedy generation is offered to lm-eval; the task asks for {unused}.")
        ending = self._tokens.token(self.eot_token_id)
        stops = [handle_stop_sequences(list(one["until"]), ending) for one in settings]
        most = [one["max_gen_toks"] for one in settings]
        if max(most) >= self.max_length:
            raise NibbleError(
                f"the task asks for up to {max(most):,} new tokens (max_gen_toks), which leaves nothing of max_length "
                f"{self.max_length:,} for the prompt.\nGive --gen_kwargs max_gen_toks=…, or model_args max_length=…."
            )
        whole = [self.tok_encode(text) for text, _ in requests]
        # The prompt's end counts, as for `hf`.
        prompts = [ids[-(self.max_length - limit) :] for ids, limit in zip(whole, most, strict=True)]
        cut = sum(len(prompt) < len(ids) for prompt, ids in zip(prompts, whole, strict=True))
        if cut:
            log.warning(
                f"{cut:,} prompts are longer than max_length {self.max_length:,} less max_gen_toks: their beginning is "
                "left out."
            )
        new: list[list[int]] = [[] for _ in requests]
        # A token that says anything says a byte or more, so a stop text that has just come is in so many tokens.
        reach = [max(len(stop.encode()) for stop in row) + 4 for row in stops]

        def ends(row: int, token: int) -> bool:
            new[row].append(token)
            text = self._tokens.decode(new[row][-reach[row] :])
            return len(new[row]) >= most[row] or any(stop in text for stop in stops[row] if stop)

        generated = self.model.generate(prompts, max(most), stop=self._tokens.eos_ids, on_token=ends)
        return [
            postprocess_generated_text(self._tokens.decode(one.tokens, skip_special=True), stop, None)
            for one, stop in zip(generated, stops, strict=True)
        ]
