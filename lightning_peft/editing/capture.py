"""Read head outputs at the last token, keeping nothing else and never running the language-model head."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.editing.heads import HeadSite
from lightning_peft.positions import calling


class HeadCapture:
    """Context manager that reads the heads' outputs of every row's last real token.

    The chosen position is cut out inside the hook, so a batch costs `B * layers * heads * head_dim` numbers, not
    `T` times that.

    Args:
        backbone: a transformers model (its trunk is run, not its head) or any module called with the batch's tensors.
        sites: the projections whose inputs are read, from `head_sites`.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from lightning_peft.editing import head_sites
        >>> model = LlamaForCausalLM(LlamaConfig(hidden_size=32, intermediate_size=32, num_hidden_layers=2,
        ...                                      num_attention_heads=4, vocab_size=40))
        >>> with HeadCapture(model, head_sites(model)) as capture:
        ...     capture(torch.zeros(3, 5, dtype=torch.long), torch.ones(3, 5)).shape
        torch.Size([3, 2, 4, 8])
    """

    def __init__(self, backbone: nn.Module, sites: Sequence[HeadSite]) -> None:
        self.backbone = backbone
        self.sites = list(sites)
        self._rows: Tensor | None = None
        self._last: Tensor | None = None
        self._read: dict[int, Tensor] = {}
        self._handles: list[Any] = []

    def __enter__(self) -> HeadCapture:
        for i, site in enumerate(self.sites):
            module = self.backbone.get_submodule(site.name)
            self._handles.append(module.register_forward_pre_hook(self._reader(i)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._read.clear()

    @torch.no_grad()
    def __call__(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Run the trunk on one batch.

        Args:
            input_ids: `[B, T]`, padded on either side.
            attention_mask: `[B, T]`, 1 on real tokens; default all.

        Returns:
            `[B, layers, heads, head_dim]` in float32 on the CPU.

        Raises:
            RuntimeError: a site was not reached.
        """
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask.long()
        steps = torch.arange(mask.shape[1], device=mask.device)
        self._rows, self._last = torch.arange(len(mask), device=mask.device), (mask * steps).argmax(-1)
        self._read.clear()
        run_trunk(self.backbone, input_ids, mask)
        if missed := [site.name for i, site in enumerate(self.sites) if i not in self._read]:
            raise RuntimeError(
                f"{len(missed)} head sites were not reached by the forward pass, the first is {missed[0]}."
            )
        return torch.stack([self._read[i] for i in range(len(self.sites))], dim=1)

    def _reader(self, index: int) -> Any:
        site = self.sites[index]

        def read(module: nn.Module, args: tuple[Any, ...]) -> None:
            assert self._rows is not None and self._last is not None
            x = args[0].reshape(len(self._rows), -1, site.num_heads, site.head_dim)
            self._read[index] = x[self._rows.to(x.device), self._last.to(x.device)].float().cpu()

        return read


def capture_tokens(
    backbone: nn.Module, sites: Sequence[HeadSite], sequences: Sequence[Sequence[int]], batch_size: int = 32
) -> Tensor:
    """Head outputs at the last token of each sequence, batched by length so that little is padding.

    Args:
        backbone: as `HeadCapture`.
        sites: from `head_sites`.
        sequences: token ids, one list a text.
        batch_size: texts a forward pass.

    Returns:
        `[N, layers, heads, head_dim]`, float32, in the order of `sequences`.
    """
    if any(len(tokens) == 0 for tokens in sequences):
        raise ValueError("A text without tokens has no last token to read.")
    device = next(backbone.parameters()).device
    order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))
    parts: list[Tensor] = []
    with HeadCapture(backbone, sites) as capture:
        for begin in range(0, len(order), batch_size):
            chosen = [sequences[i] for i in order[begin : begin + batch_size]]
            width = max(map(len, chosen))
            ids = torch.tensor([[*tokens, *[0] * (width - len(tokens))] for tokens in chosen])
            mask = torch.tensor([[1] * len(tokens) + [0] * (width - len(tokens)) for tokens in chosen])
            parts.append(capture(ids.to(device), mask.to(device)))
    captured = torch.cat(parts)
    back = torch.empty(len(order), dtype=torch.long)
    back[torch.tensor(order)] = torch.arange(len(order))
    return captured[back]


def run_trunk(backbone: nn.Module, input_ids: Tensor, attention_mask: Tensor) -> Any:
    """Run a transformers model without its head (any other module: as it is), with explicit position ids."""
    model: nn.Module = getattr(backbone, "get_base_model", lambda: backbone)()  # looks into a PeftModel
    trunk = getattr(model, getattr(model, "base_model_prefix", "") or "", model)
    arguments: dict[str, Any] = {"attention_mask": attention_mask, "use_cache": False}
    places = (attention_mask.cumsum(-1) - 1).clamp(min=0)
    arguments["position_ids"] = places + _first_place(trunk)
    accepted = inspect.signature(type(trunk).forward).parameters
    if not any(p.kind is p.VAR_KEYWORD for p in accepted.values()):
        arguments = {name: value for name, value in arguments.items() if name in accepted}
    edits = {**arguments, "position_ids": places}
    with calling(model, input_ids=input_ids, **edits):  # for other edits on the model, if there are any
        return trunk(input_ids, **arguments)


def _first_place(trunk: nn.Module) -> int:
    """The position id of the first token: RoBERTa and its kin count from behind the id that padding has."""
    tables = (m for name, m in trunk.named_modules() if isinstance(m, nn.Embedding) and "position" in name)
    padding = (table.padding_idx for table in tables)
    return next((int(index) + 1 for index in padding if index is not None), 0)
