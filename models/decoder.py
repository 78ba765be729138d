"""The frame that every architecture shares: embed, decoder layers, final norm, head.

Shapes: N tokens of a flat batch, B batch, T sequence, H hidden, V vocabulary.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, Self, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.attention.gqa import GroupedQueryAttention
from models.attention.mla import LatentAttention
from models.attention.rope import RopeConfig
from models.blocks.balance import Balance
from models.blocks.documents import Documents
from models.blocks.factory import Factory
from models.blocks.groups import Group
from models.blocks.linear import Linear, keeping_dense
from models.blocks.mlp import FeedForward
from models.blocks.norm import RMSNorm
from models.blocks.recomputed import FirstPass
from models.blocks.usage import ExpertUsage, RouterWatch
from models.generation.engine import Generated, generate
from models.generation.sampling import GREEDY, Sampling
from quant.common.devices import on_cpu
from quant.common.errors import FLOAT16, NibbleError
from quant.products import without_autocast
from quant.storage import DenseStorage, Storage

# run(layer, *inputs): the output of a layer, or of a part of one, perhaps to be computed again for its gradients.
Run = Callable[..., Any]

_Reduced = TypeVar("_Reduced")  # one tensor, or several


class DecoderConfig(Protocol):
    """What the frame reads of an architecture's config. tied: the head is the embedding."""

    @property
    def vocabulary(self) -> int: ...
    @property
    def hidden(self) -> int: ...
    @property
    def tied(self) -> bool: ...
    @property
    def rope(self) -> RopeConfig: ...


@dataclass(frozen=True)
class HubForm:
    """What an architecture's checkpoints on the hub have that can't be read off its modules.

    All other names are those of the modules.

    renamed: the end of a native name, and what the hub has in its place.
    carried: patterns (full match) of keys that nothing here computes with (prediction layers, vision towers).
    counted_buffers: ends of the names of buffers that are parameters in transformers.
    vision_language: the checkpoint is a vision-language model: keys under `model.language_model`, experts fused.
    two_classes: transformers has a class of the vision-language model and one of its text model, with names of its own.
    """

    renamed: Mapping[str, str] = field(default_factory=dict)
    carried: tuple[str, ...] = ()
    counted_buffers: tuple[str, ...] = ()
    vision_language: bool = False
    two_classes: bool = False


def prediction_layers(layers: int, extra: int) -> tuple[str, ...]:
    """Patterns for the keys of the `extra` layers for multi-token prediction that follow the first `layers`."""
    return tuple(rf"model\.layers\.{layers + index}\..*" for index in range(extra))


class Embedding(nn.Module):
    """Rows of `weight` [V, H], in its dtype, for tokens int64 [N]."""

    group: ClassVar[Group] = "embedding"

    def __init__(self, vocabulary: int, hidden: int, factory: Factory) -> None:
        super().__init__()
        self.weight = factory.empty(vocabulary, hidden)

    def forward(self, tokens: Tensor) -> Tensor:
        return nn.functional.embedding(tokens, self.weight)


class PreNormLayer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)): what most architectures' layers are. norm: makes one, by size."""

    def __init__(
        self,
        hidden: int,
        attention: LatentAttention | GroupedQueryAttention,
        mlp: FeedForward,
        norm: Callable[[int], RMSNorm],
    ) -> None:
        super().__init__()
        self.input_layernorm = norm(hidden)
        self.self_attn = attention
        self.post_attention_layernorm = norm(hidden)
        self.mlp = mlp

    def forward(self, x: Tensor, documents: Documents, tables: tuple[Tensor, Tensor]) -> Tensor:
        """x [N, H] and the rotary tables of its positions: [N, H]."""
        x, normed = self.input_layernorm.after(x, room=self.self_attn.room())
        attended = self.self_attn(normed, documents, tables)
        x, *copies = self.post_attention_layernorm.after(x, attended, copies=self.mlp.uses)
        out: Tensor = self.mlp(*copies, plus=x)
        return out


class Decoder(nn.Module):
    """`model.*` of a hub checkpoint: everything but the head. norm: the final one."""

    def __init__(self, config: DecoderConfig, layers: Sequence[nn.Module], norm: nn.Module, factory: Factory) -> None:
        super().__init__()
        self.embed_tokens = Embedding(config.vocabulary, config.hidden, factory)
        self.layers = nn.ModuleList(layers)
        self.norm = norm
        self.rope = config.rope

    def forward(self, tokens: Tensor, documents: Documents, run: Run) -> Tensor:
        """tokens int64 [N] of packed documents: the hidden states [N, H] after the final norm.

        run: calls each layer. An architecture whose layers pass on more than hidden states has a forward of its own.
        """
        x = self.embed_tokens(tokens)
        tables = self.rope.tables(documents.positions)
        for layer in self.layers:
            x = run(layer, x, documents, tables)
        return self.norm(x)


class Head(Linear):
    """The projection to the vocabulary, a Linear whose weight [V, H] is never quantised."""

    group: ClassVar[Group] = "head"

    def reduce(self, hidden: Tensor, function: Callable[[Tensor, Tensor], _Reduced]) -> _Reduced:
        """function(hidden, weight): for what is computed of the logits without their ever being there all at once.

        Where the weight is cut into parts on several processes, it is whole inside `function`, and only there.
        """
        assert isinstance(self.weight, DenseStorage)
        return function(hidden, self.weight.value)


class CausalLM(nn.Module):
    """A decoder with a head, over documents packed into a flat batch.

    config: the architecture's parsed configuration. model_type: as in config.json. spec, dtype: how the frozen
    matrices are stored, and the dtype of everything else and of activations, which follows a cast (`to`, `float` …).
    NibbleError for float16, and, naming the matrix, where `spec` can't keep its shape. hub: see HubForm.
    activation_checkpointing: in training, keep only every layer's input and compute the layer again for its gradients.
    balance: what watches how evenly the experts are chosen (models/blocks/balance.py); None: nothing does. usage:
    likewise what counts their tokens (models/blocks/usage.py).
    """

    def __init__(
        self,
        config: DecoderConfig,
        decoder: Decoder,
        factory: Factory,
        *,
        model_type: str,
        hub: HubForm | None = None,
    ) -> None:
        super().__init__()
        _refuse_float16(factory.dtype)
        self.config, self.model_type, self.spec, self.hub = config, model_type, factory.spec, hub or HubForm()
        self.activation_checkpointing = False
        self.balance: Balance | None = None
        self.usage: ExpertUsage | None = None
        self.model = decoder
        self.lm_head = Head(config.hidden, config.vocabulary, factory.dense)
        if config.tied:
            self.lm_head.weight.value = decoder.embed_tokens.weight
        for name, module in self.named_modules():
            if isinstance(module, Storage):
                module.name = name
                module.check(module.spec, module.shape, module.dtype, name)

    @property
    def dtype(self) -> torch.dtype:
        return self.model.embed_tokens.weight.dtype

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        _refuse_float16(fn(torch.empty(0, dtype=self.dtype)).dtype)  # before anything is cast
        return super()._apply(fn, recurse)

    @property
    def device(self) -> torch.device:
        return self.model.embed_tokens.weight.device

    @property
    def head(self) -> Head:
        return self.lm_head

    @property
    def vocabulary(self) -> int:
        return self.lm_head.out_features

    @property
    def watches(self) -> list[RouterWatch]:
        """What is told of every forward pass."""
        return [watch for watch in (self.balance, self.usage) if watch is not None]

    @without_autocast
    def hidden(self, tokens: Tensor, documents: Documents) -> Tensor:
        """tokens int64 [N] of packed documents: the hidden states [N, H] after the final norm."""
        for watch in self.watches:
            watch.begin(documents)
        return self.model(tokens, documents, self._run)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens int64 [B, T], every row a document of its own: logits [B, T, V] in the model's dtype.

        Raises NibbleError for another shape or dtype and, on the CPU, where it costs next to nothing, for tokens that
        the vocabulary doesn't have.
        """
        _check_tokens(tokens, self.vocabulary)
        batch, length = tokens.shape
        documents = Documents.from_lengths([length] * batch, tokens.device)
        return self.lm_head(self.hidden(tokens.flatten(), documents)).unflatten(0, (batch, length))

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        *,
        sampling: Sampling = GREEDY,
        stop: Collection[int] = (),
        seed: int | None = None,
        on_token: Callable[[int, int], bool] | None = None,
    ) -> list[Generated]:
        """Continues prompts of any lengths, together and without padding: see models/generation/engine.py.

        Raises NibbleError for a model that is cut over processes: each would have to compute the same steps as all.
        """
        meshes = (getattr(parameter, "device_mesh", None) for parameter in self.parameters())  # of a DTensor
        if any(mesh is not None and mesh.size() > 1 for mesh in meshes):
            raise NibbleError(
                "the model is cut over several processes, where generating isn't offered.\n"
                "Load it whole in one process: load_model, or python -m train.generate without torchrun."
            )
        return generate(self, prompts, max_new_tokens, sampling=sampling, stop=stop, seed=seed, on_token=on_token)

    def _run(self, layer: Callable[..., Any], *inputs: Any) -> Any:
        if not (self.activation_checkpointing and torch.is_grad_enabled()):
            return layer(*inputs)
        # Nothing in a layer is random, so there is no generator state to keep.
        return checkpoint(layer, *inputs, use_reentrant=False, preserve_rng_state=False, context_fn=self._contexts)

    def _contexts(self) -> tuple[contextlib.AbstractContextManager[None], contextlib.AbstractContextManager[None]]:
        """Around a layer's computation and its recomputation, which must not count the experts' choices again."""
        first = FirstPass()
        return self._within(first.computing()), self._within(first.again(), *(w.paused() for w in self.watches))

    @contextlib.contextmanager
    def _within(self, *contexts: contextlib.AbstractContextManager[None]) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            stack.enter_context(keeping_dense())
            for context in contexts:
                stack.enter_context(context)
            yield


def _check_tokens(tokens: Tensor, vocabulary: int) -> None:
    shape, kind = list(tokens.shape), str(tokens.dtype).removeprefix("torch.")
    if len(shape) != 2 or 0 in shape or kind not in ("int64", "int32"):
        single = "\nA single document is tokens[None]." if len(shape) == 1 else ""
        raise NibbleError(f"tokens are {kind} {shape}; the model takes int64 [B, T], a document per row.{single}")
    if not on_cpu(tokens.device):
        return
    low, high = map(int, tokens.aminmax())
    if low < 0 or high >= vocabulary:
        raise NibbleError(
            f"tokens are {low} to {high}; the model's vocabulary has 0 to {vocabulary - 1}.\n"
            "Do tokenizer and model belong together?"
        )


def _refuse_float16(dtype: torch.dtype) -> None:
    if dtype == torch.float16:
        raise NibbleError(f"{FLOAT16}.")
