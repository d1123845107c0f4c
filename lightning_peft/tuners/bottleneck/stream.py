"""Find where a model's residual stream stands before and behind each feed-forward part, by watching one call."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from lightning_peft.backbone.evaluating import evaluating
from lightning_peft.backbone.modules import base_modules, is_matrix
from lightning_peft.backbone.peft_private import without_adapters
from lightning_peft.backbone.structure import Block, blocks, matrix_shape
from lightning_peft.stack.adapter_files.example_inputs import candidates

_SHAPES = ((2, 3), (2,), (1, 2, 2))  # rows, and positions, of hidden states that blocks take

# where a model has its sites is asked again when its adapters are in place, and it may be sharded by then
_SEEN: WeakKeyDictionary[nn.Module, dict[str, StreamSite]] = WeakKeyDictionary()


@dataclass(frozen=True)
class StreamSite:
    """The residual stream before and behind one feed-forward part.

    Args:
        before: the module whose input is the stream that the part is given: its norm, or without one before it the
            part's first matrix.
        block: the block, which gives the stream behind the part.
        norm: where the stream behind the part is what a norm gives (post-LN models), that norm.
    """

    before: str
    block: str
    norm: str | None


def stream_sites(backbone: nn.Module, targets: Collection[str]) -> dict[str, StreamSite]:
    """Return for the last matrix of each feed-forward part where the stream stands; nothing is changed.

    Neither names nor the order in which modules are registered tell: so the model is run once on a small input, and
    what its norms take and give is compared with what blocks and parts do. A model of transformers runs on an input
    made from its configuration; the blocks of any other are run by themselves.

    Args:
        backbone: any module with repeated blocks.
        targets: full names of last matrices.

    Raises:
        ValueError: a block cannot be run, or what it gives is not as wide as its feed-forward part's output.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> model = LlamaForCausalLM(LlamaConfig(hidden_size=32, intermediate_size=32, num_hidden_layers=1,
        ...                                      num_attention_heads=4, vocab_size=40))
        >>> stream_sites(model, ["model.layers.0.mlp.down_proj"])["model.layers.0.mlp.down_proj"]
        StreamSite(before='model.layers.0.post_attention_layernorm', block='model.layers.0', norm=None)
    """
    known = _SEEN.setdefault(backbone, {})
    chosen = [block for block in blocks(backbone) if block.mlp and block.mlp.last in targets]
    unknown = [block for block in chosen if block.mlp and block.mlp.last not in known]
    if unknown:
        with without_adapters(backbone), _watched(backbone, unknown) as calls:
            _run(backbone, unknown, calls)
        known |= {block.mlp.last: _site(backbone, block, calls) for block in unknown if block.mlp}
    return {target: known[target] for target in targets if target in known}


@dataclass
class _Call:
    """What a module was given and gave, when it was first called."""

    given: Tensor
    gave: Tensor


Calls = dict[str, _Call]


@contextmanager
def _watched(backbone: nn.Module, chosen: Sequence[Block]) -> Iterator[Calls]:
    """Note the first calls of blocks, of their parts' first matrices, and of what could be a norm in them."""
    calls: Calls = {}
    named = dict(base_modules(backbone))
    names = {block.name for block in chosen} | {block.mlp.first for block in chosen if block.mlp}
    for block in chosen:
        inside = (name for name in named if name.startswith(f"{block.name}."))
        names |= {name for name in inside if not any(is_matrix(module) for module in named[name].modules())}

    def note(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            first = output[0] if isinstance(output, tuple | list) and output else output
            if name not in calls and args and isinstance(args[0], Tensor) and isinstance(first, Tensor):
                calls[name] = _Call(_kept(args[0]), _kept(first))

        return hook

    handles = [(named[name], note(name)) for name in sorted(names)]
    held = [module.register_forward_hook(hook) for module, hook in handles]
    try:
        yield calls
    finally:
        for handle in held:
            handle.remove()


def _run(backbone: nn.Module, chosen: Sequence[Block], calls: Calls) -> None:
    """Call the model, or, where nothing is known of its input, its blocks."""
    models: list[str] = []
    for name, module in backbone.named_modules():
        inside = any(model == "" or name.startswith(f"{model}.") for model in models)
        if not inside and hasattr(module, "main_input_name") and hasattr(module, "config"):
            models.append(name)
            for probe in _probes(module):
                try:
                    # what a model makes on the way, such as positions, must lie where its weights do
                    with torch.device(_like(module).device), torch.no_grad(), evaluating(module):
                        module(**probe)
                    break
                except Exception:  # whatever a model says of an input that is not for it
                    _forget(calls, f"{name}." if name else "")
    generator = torch.Generator().manual_seed(0)
    with evaluating(backbone), torch.enable_grad():
        for block in chosen:
            if block.name in calls or type(block.module).forward is nn.Module.forward:
                continue
            assert block.mlp is not None
            width = matrix_shape(dict(base_modules(backbone))[block.mlp.last])[1]
            for shape, mask in itertools.product(_SHAPES, ((), (None,))):
                x = torch.randn(*shape, width, generator=generator)
                try:
                    # with a gradient, PyTorch's own layers take no fused path around their parts
                    block.module(x.to(_like(block.module)).requires_grad_(), *mask)
                    break
                except Exception:  # whatever a block says of an input that is not for it
                    _forget(calls, f"{block.name}.")


def _forget(calls: Calls, start: str) -> None:
    for name in [name for name in calls if name.startswith(start)]:
        del calls[name]


def _probes(model: Any) -> Iterator[dict[str, Any]]:
    """Yield inputs that a model of transformers may take, on its device and in its precision."""
    no_cache = {"use_cache": False} if "use_cache" in inspect.signature(type(model).forward).parameters else {}
    like = _like(model)
    try:
        for probe in candidates(model, torch.Generator().manual_seed(0)):
            tensors = {key: x.to(like if x.is_floating_point() else like.device) for key, x in probe.items()}
            yield {**tensors, **no_cache}
            if like.is_meta:  # without a cache a model looks at the positions, which have no values there
                yield tensors
    except Exception:  # of a configuration that names no inputs
        return


def _like(block: nn.Module) -> Tensor:
    """Return a parameter of a block, in the precision that it computes in."""
    return next((p for p in block.parameters() if p.is_floating_point()), torch.zeros(()))


def _site(backbone: nn.Module, block: Block, calls: Calls) -> StreamSite:
    assert block.mlp is not None
    first, last = block.mlp.first, block.mlp.last
    if block.name not in calls or first not in calls:
        unseen = block.name if block.name not in calls else first
        raise ValueError(f"{type(backbone).__name__} shows no residual stream: {unseen} could not be run by itself")
    width, gave = matrix_shape(dict(base_modules(backbone))[last])[1], calls[block.name].gave
    if gave.shape[-1] != width:
        raise ValueError(f"{block.name} gives {tuple(gave.shape)}, and its feed-forward part {width} features")
    inside = {name: call for name, call in calls.items() if name.startswith(f"{block.name}.") and name != first}
    norms = {name: call for name, call in inside.items() if not _same(call.given, call.gave)}
    behind = [name for name, call in norms.items() if _same(call.gave, gave)]
    if behind:
        return StreamSite(first, block.name, behind[-1])
    before = [name for name, call in norms.items() if _same(call.gave, calls[first].given)]
    return StreamSite(before[-1] if before else first, block.name, None)


def _kept(x: Tensor) -> Tensor:
    """Return the tensor's values as they are now; without values (on the meta device) the tensor."""
    return x.detach() if x.is_meta else x.detach().clone()


def _same(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors hold the same numbers, in whatever shape of rows and positions."""
    if a.shape[-1:] != b.shape[-1:] or a.numel() != b.numel():
        return False
    if a.is_meta:
        return a.untyped_storage()._cdata == b.untyped_storage()._cdata
    return bool(torch.equal(a.flatten(), b.flatten()))
