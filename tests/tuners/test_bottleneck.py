"""Bottleneck layers: their formula, what they share, what they note, and how linear ones are merged."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_models import tiny
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from tuning import QUIET, one_sentence

from lightning_peft import load_adapter, save_adapter
from lightning_peft.backbone.parts import part_ends
from lightning_peft.backbone.structure import matrix_shape
from lightning_peft.stack.stack import stack_of
from lightning_peft.tuners.bottleneck import BottleneckConfig, BottleneckLayer
from lightning_peft.tuners.bottleneck.branch import Bottleneck
from lightning_peft.tuners.bottleneck.kronecker import KroneckerLinear

pytestmark = [pytest.mark.filterwarnings(warning) for warning in QUIET]


class Part(nn.Module):
    """A feed-forward part, `[..., 6] -> [..., 6]`."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first, self.last = nn.Linear(6, 10), nn.Linear(10, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.first(x)))


def layers(model: nn.Module) -> list[BottleneckLayer]:
    return [module for module in model.modules() if isinstance(module, BottleneckLayer)]


def shaken(model: Any, config: BottleneckConfig, name: str = "a") -> Any:
    """The model with an adapter whose parameters are random."""
    stack_of(model).add(config, name)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


SEQUENTIAL: dict[str, Any] = {"target_modules": ["last"], "size": 4}
PARALLEL: dict[str, Any] = {**SEQUENTIAL, "placement": "parallel", "inputs": {"last": "first"}}
LINEAR: dict[str, Any] = {"activation": "linear", "biases": False}
X = torch.randn(3, 5, 6, generator=torch.Generator().manual_seed(2))


# -- the formula ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("activation", "f"),
    [
        ("relu", nn.ReLU()),
        ("gelu", nn.GELU()),
        ("swish", nn.SiLU()),
        ("tanh", nn.Tanh()),
        ("sigmoid", nn.Sigmoid()),
        ("linear", nn.Identity()),
    ],
)
@pytest.mark.parametrize("options", [SEQUENTIAL, PARALLEL], ids=["sequential", "parallel"])
def test_the_output_is_the_papers_formula(options: dict[str, Any], activation: str, f: nn.Module) -> None:
    part = shaken(Part(), BottleneckConfig(**options, activation=activation, alpha=3.0, scaling="channel", gate=True))
    y, branch = Part()(X), part.last.bottleneck["a"]
    z = y if options is SEQUENTIAL else X
    gate = 1 / (1 + torch.exp(-(z @ branch.gate.weight.T + branch.gate.bias)))
    up = f(z @ branch.down.weight.T + branch.down.bias) @ branch.up.weight.T + branch.up.bias
    torch.testing.assert_close(part(X), y + 3.0 * gate * branch.scale * up)


@pytest.mark.parametrize("init", ["lora", "mam", "bert", "houlsby", "glorot"])
def test_each_initialisation_has_its_spread(init: str) -> None:
    torch.manual_seed(0)
    branch = Bottleneck(400, 400, BottleneckConfig(target_modules=[""], size=100, init=init, gate=True))
    down, up = branch.down.weight, branch.up.weight
    zero = init in ("lora", "mam")
    deviation = {"bert": 0.02, "houlsby": 0.01 * 0.88, "glorot": (2 / 500) ** 0.5}.get(init, 400**-0.5 / 3**0.5)
    assert down.std().item() == pytest.approx(deviation, rel=0.03)  # 0.88: what truncation at two deviations leaves
    assert bool(up.any()) is not zero and not branch.down.bias.any() and not branch.up.bias.any()
    assert zero or up.std().item() == pytest.approx(deviation, rel=0.03)
    assert branch.gate is not None and branch.gate.weight.std().item() == pytest.approx(0.02, rel=0.15)
    assert torch.equal(branch(torch.ones(2, 400)), torch.zeros(2, 400)) is zero


def test_a_parallel_linear_bottleneck_is_lora_with_the_same_matrices() -> None:
    part = shaken(Part(), BottleneckConfig(target_modules=["last"], size=2, placement="parallel", alpha=0.5, **LINEAR))
    lora = Part()
    stack_of(lora).add(LoraConfig(r=2, lora_alpha=1, target_modules=["last"]), "l")
    branch = part.last.bottleneck["a"]
    wrapped: Any = lora.last
    with torch.no_grad():
        wrapped.lora_A["l"].weight.copy_(branch.down.weight)
        wrapped.lora_B["l"].weight.copy_(branch.up.weight)
    torch.testing.assert_close(part(X), lora(X))
    assert not torch.allclose(part(X), Part()(X))


def test_stochastic_depth_leaves_the_adapter_out_for_whole_rows_in_training() -> None:
    torch.manual_seed(0)
    part = shaken(Part(), BottleneckConfig(**SEQUENTIAL, drop_path=0.25))
    base, full = Part()(X), part(X)
    x, branch = X[:1].expand(400, -1, -1), part.last.bottleneck["a"]
    branch.train()
    change = part(x) - base[:1]
    left_out = change.flatten(1).abs().max(1).values < 1e-6
    assert 0.15 < left_out.float().mean().item() < 0.35
    torch.testing.assert_close(change[~left_out], ((full - base)[:1] / 0.75).expand(int((~left_out).sum()), -1, -1))
    branch.eval()
    assert torch.equal(part(X), full)


def test_dropout_acts_in_training_only() -> None:
    part = shaken(Part(), BottleneckConfig(**PARALLEL, dropout=0.5))
    assert torch.equal(part(X), part(X))
    part.last.bottleneck["a"].train()
    assert not torch.equal(part(X), part(X))


def test_the_dial_scales_and_at_nothing_is_the_base_bit_for_bit() -> None:
    part = shaken(Part(), BottleneckConfig(**PARALLEL, scaling="learned"))
    base, full = Part()(X), part(X)
    stack_of(part).scale(0.5)
    torch.testing.assert_close(part(X), (base + full) / 2)
    stack_of(part).scale(0.0)
    assert torch.equal(part(X), base)
    stack_of(part).scale(1.0)
    with stack_of(part).disabled():
        assert torch.equal(part(X), base)
    assert torch.equal(part(X), full) and not torch.equal(full, base)


# -- Kronecker products ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "inputs", "outputs"), [(1, 5, 3), (2, 8, 6), (4, 8, 12)])
def test_a_kronecker_matrix_is_the_sum_of_products(n: int, inputs: int, outputs: int) -> None:
    torch.manual_seed(0)
    layer, rule, x = KroneckerLinear(inputs, outputs, n), torch.randn(n, n, n), torch.randn(2, 3, inputs)
    nn.init.normal_(layer.bias)  # type: ignore[arg-type]
    matrix = sum(torch.kron(rule[i], torch.outer(layer.left[i], layer.right[i])) for i in range(n))
    torch.testing.assert_close(layer.matrix(rule), matrix.T)
    torch.testing.assert_close(layer(x, rule), x @ matrix + layer.bias)
    assert sum(p.numel() for p in layer.parameters()) == inputs + 2 * outputs


def compacter(**options: Any) -> BottleneckConfig:
    return BottleneckConfig(target_modules=["o_proj", "down_proj"], size=4, kronecker=2, **options)


def test_all_layers_share_one_tensor_that_is_kept_and_saved_once(tmp_path: Path) -> None:
    model = shaken(tiny("llama"), compacter())
    assert len(layers(model)) == 6
    assert len({id(layer._rule("a")) for layer in layers(model)}) == 1
    assert [name for name in model.state_dict() if "rule" in name] == [
        "model.layers.0.self_attn.o_proj.bottleneck_rule.a"
    ]
    save_adapter(model, tmp_path)
    from safetensors.torch import load_file

    assert sum("rule" in key for key in load_file(tmp_path / "adapter_model.safetensors")) == 1


def test_every_layer_sends_its_gradient_to_the_shared_tensor(tokens: Tensor) -> None:
    model = shaken(tiny("llama"), compacter())
    rule = layers(model)[0]._rule("a")
    parts = []
    for layer in layers(model):
        for other in layers(model):
            other.scaling["a"] = float(other is layer)
        (gradient,) = torch.autograd.grad(model(tokens, labels=tokens).loss, [rule])
        parts.append(gradient)
    assert all(gradient.any() for gradient in parts)


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copy_shares_its_own_tensor(how: str, tokens: Tensor) -> None:
    model = shaken(tiny("llama"), compacter())
    if how == "deepcopy":
        other = copy.deepcopy(model)
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    assert len({id(layer._rule("a")) for layer in layers(other)}) == 1
    before = model(tokens).logits
    assert torch.equal(other(tokens).logits, before)
    with torch.no_grad():
        layers(other)[0]._rule("a").add_(1.0)  # type: ignore[union-attr]
    assert torch.equal(model(tokens).logits, before) and not torch.equal(other(tokens).logits, before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 4, "kronecker": 5}, r"^The input has 6 features, which kronecker=5 does not divide\.$"),
        ({"size": 5, "kronecker": 3}, r"^The bottleneck has 5 features, which kronecker=3 does not divide\.$"),
    ],
)
def test_products_that_do_not_divide_a_width_are_one_sentence(options: dict[str, Any], message: str) -> None:
    part = Part()
    with pytest.raises(ValueError, match=message) as error:
        stack_of(part).add(BottleneckConfig(target_modules=["last"], **options))
    assert one_sentence(str(error.value)) and torch.equal(part(X), Part()(X))


def test_a_bottleneck_chosen_by_reduction_is_rounded_up_to_the_products() -> None:
    assert BottleneckConfig(target_modules=[""], reduction=32, kronecker=4).size_for(576) == 20
    assert BottleneckConfig(target_modules=[""], reduction=32).size_for(576) == 18
    assert BottleneckConfig(target_modules=[""], reduction=96).size_for(32) == 1


# -- the input of another matrix ------------------------------------------------------------------------------------


def test_checkpointing_gives_the_same_gradients() -> None:
    part = shaken(Part(), BottleneckConfig(**PARALLEL))
    gradients = []
    for run in (part, lambda x: checkpoint(part, x, use_reentrant=False)):
        part.zero_grad()
        run(X.clone().requires_grad_()).square().sum().backward()
        gradients.append([p.grad.clone() for p in part.parameters() if p.requires_grad])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_nothing_is_kept_of_a_call_and_a_copy_notes_for_itself() -> None:
    part = shaken(Part(), BottleneckConfig(**PARALLEL))
    part.first(X.requires_grad_())
    other = copy.deepcopy(part)
    assert part.last._noted.get() and not other.last._noted.get()
    expected = part(X)
    assert not part.last._noted.get()
    assert torch.equal(other(X), expected)
    with torch.no_grad():
        other.last.bottleneck["a"].down.weight.zero_()
    assert torch.equal(part(X), expected) and not torch.equal(other(X), expected)


def test_removing_the_adapter_leaves_no_hook() -> None:
    part = shaken(Part(), BottleneckConfig(**PARALLEL))
    stack_of(part).add(BottleneckConfig(**PARALLEL), "b")
    assert len(part.first._forward_pre_hooks) == 2
    stack_of(part).remove("a")
    assert [hook.adapter_name for hook in part.first._forward_pre_hooks.values()] == ["b"]
    stack_of(part).remove("b")
    assert not part.first._forward_pre_hooks and type(part.last) is nn.Linear


@pytest.mark.parametrize("first", ["lora", "bottleneck"])
def test_lora_around_the_matrix_that_is_read_changes_nothing_of_it(first: str) -> None:
    part = Part()
    lora, bottleneck = LoraConfig(r=2, target_modules=["first"]), BottleneckConfig(**PARALLEL)
    for config in (lora, bottleneck) if first == "lora" else (bottleneck, lora):
        shaken(part, config, name="l" if config is lora else "a")
    branch: Any = part.last.bottleneck["a"]
    with stack_of(part).disabled("a"):
        y = part(X)
    torch.testing.assert_close(part(X), y + branch(X))
    stack_of(part).remove("l")
    torch.testing.assert_close(part(X), Part()(X) + branch(X))


def test_an_output_without_its_input_is_one_sentence() -> None:
    part = shaken(Part(), BottleneckConfig(**PARALLEL))
    with pytest.raises(RuntimeError, match="but it was not called before") as error:
        part.last(torch.zeros(3, 10))
    assert one_sentence(str(error.value))
    part.first(torch.zeros(2, 6))
    with pytest.raises(RuntimeError, match=r"but it had an input of shape \(2, 6\)\.$"):
        part.last(torch.zeros(3, 10))


# -- the residual stream --------------------------------------------------------------------------------------------


class Blocks(nn.Module):
    """A part beside a residual, then a norm; the block gives a tuple, as many do."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.part = Part()
            self.norm = nn.LayerNorm(6)
            with torch.no_grad():
                self.norm.weight.add_(0.3), self.norm.bias.add_(torch.linspace(-1, 1, 6))

        def forward(self, x: Tensor) -> tuple[Tensor, str]:
            return self.norm(x + self.part(x)), "more"

    def __init__(self) -> None:
        super().__init__()
        self.block = self.Block()

    def forward(self, x: Tensor) -> Tensor:
        h, more = self.block(x)
        assert more == "more"
        return h


STREAM: dict[str, Any] = {"target_modules": ["last"], "size": 4, "placement": "stream", "outputs": {"last": "first"}}
BEHIND: dict[str, Any] = {**STREAM, "outputs": {"block.part.last": "block"}}
NORM: dict[str, Any] = {**STREAM, "outputs": None, "norms": {"block.part.last": "block.norm"}}


def branch_of(model: Any, name: str = "a") -> Any:
    return model.block.part.last.bottleneck[name]


@pytest.mark.parametrize("gate", [False, True])
def test_on_the_stream_it_reads_and_adds_to_what_the_block_gives(gate: bool) -> None:
    model, h = shaken(Blocks(), BottleneckConfig(**BEHIND, alpha=3.0, gate=gate)), Blocks()(X)
    torch.testing.assert_close(model(X), h + 3.0 * branch_of(model)(h))
    assert not torch.allclose(model(X), h)


def test_before_a_norm_it_reads_what_the_norm_gives_and_adds_to_what_it_takes() -> None:
    model, base = shaken(Blocks(), BottleneckConfig(**NORM, alpha=3.0)), Blocks()
    total, norm = X + base.block.part(X), base.block.norm
    torch.testing.assert_close(model(X), norm(total + 3.0 * branch_of(model)(norm(total))))
    assert not torch.allclose(model(X), base(X))


@pytest.mark.parametrize("options", [BEHIND, NORM], ids=["behind", "norm"])
def test_adapters_on_one_stream_read_what_those_before_them_made(options: dict[str, Any]) -> None:
    model = shaken(shaken(Blocks(), BottleneckConfig(**options)), BottleneckConfig(**options), "b")
    a, b, base = branch_of(model), branch_of(model, "b"), Blocks()
    total, norm = X + base.block.part(X), base.block.norm
    if options is NORM:
        total = total + a(norm(total))
        expected = norm(total + b(norm(total)))
    else:
        h = norm(total) + a(norm(total))
        expected = h + b(h)
    torch.testing.assert_close(model(X), expected)
    stack_of(model).remove("a")
    alone = model(X)
    torch.testing.assert_close(alone, shaken_again(options, b)(X))


def shaken_again(options: dict[str, Any], branch: nn.Module) -> nn.Module:
    """Blocks with one adapter that has the weights of another."""
    model = shaken(Blocks(), BottleneckConfig(**options))
    branch_of(model).load_state_dict(branch.state_dict())
    return model


@pytest.mark.parametrize("options", [BEHIND, NORM], ids=["behind", "norm"])
def test_a_stream_adapter_is_dialled_copied_checkpointed_and_leaves_no_hook(options: dict[str, Any]) -> None:
    model, base = shaken(Blocks(), BottleneckConfig(**options)), Blocks()(X)
    full = model(X)
    stack_of(model).scale(0.0)
    assert torch.equal(model(X), base)
    stack_of(model).scale(1.0)
    with stack_of(model).disabled():
        assert torch.equal(model(X), base)
    other = copy.deepcopy(model)
    with torch.no_grad():
        branch_of(other).up.weight.zero_(), branch_of(other).up.bias.zero_()
    assert torch.equal(model(X), full) and torch.equal(other(X), base)
    gradients = []
    for run in (model, lambda x: checkpoint(model, x, use_reentrant=False)):
        model.zero_grad()
        run(X.clone().requires_grad_()).square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
    assert all(torch.equal(a, b) and a.any() for a, b in zip(*gradients, strict=True))
    with pytest.raises(ValueError, match="cannot be written into the weights"):
        stack_of(model).merge()
    stack_of(model).remove("a")
    assert torch.equal(model(X), base) and not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("options", [BEHIND, NORM], ids=["behind", "norm"])
def test_plain_peft_switches_deletes_and_unloads_a_stream_adapter(options: dict[str, Any], tmp_path: Path) -> None:
    base = Blocks()(X)
    model: Any = get_peft_model(Blocks(), BottleneckConfig(**options))  # type: ignore[arg-type]
    with torch.no_grad():
        branch_of(model.base_model.model, "default").up.weight[0].add_(0.2)
    full = model(X)
    with model.disable_adapter():
        assert torch.equal(model(X), base)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(Blocks(), tmp_path)  # type: ignore[arg-type]
    assert torch.equal(loaded(X), full) and not torch.allclose(full, base)
    loaded.add_adapter("b", BottleneckConfig(**options))
    loaded.delete_adapter("default")
    loaded.set_adapter("b")
    assert torch.equal(loaded(X), base)
    unloaded = model.unload()
    assert torch.equal(unloaded(X), base) and not any(module._forward_hooks for module in unloaded.modules())


# -- merging --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"placement": "parallel"}], ids=["sequential", "parallel"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("kronecker", [0, 2])
def test_a_linear_adapter_merges_and_comes_out_bit_for_bit(
    kind: str, options: dict[str, Any], kronecker: int, tokens: Tensor
) -> None:
    targets = {"llama": ["down_proj"], "gpt2": ["mlp.c_proj"]}[kind]
    config = BottleneckConfig(
        target_modules=targets, size=4, alpha=0.5, scaling="channel", kronecker=kronecker, **options, **LINEAR
    )
    model = shaken(tiny(kind), config)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    unmerged = model(tokens).logits
    stack_of(model).merge()
    assert all(layer.merged for layer in layers(model))
    weights = [name for name in before if name.endswith("base_layer.weight")]
    assert weights and not any(torch.equal(model.state_dict()[name], before[name]) for name in weights)
    merged = model(tokens).logits
    assert (merged - unmerged).abs().max() <= 1e-5 * unmerged.abs().max()
    stack_of(model).unmerge()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(model(tokens).logits, unmerged)


@pytest.mark.parametrize(
    "options",
    [
        SEQUENTIAL,
        {**SEQUENTIAL, "activation": "linear"},
        {**SEQUENTIAL, **LINEAR, "gate": True},
        {**PARALLEL, **LINEAR},
        {**STREAM, **LINEAR, "outputs": {"last": "last"}},
    ],
    ids=["relu", "biases", "gate", "another's input", "stream"],
)
def test_what_is_no_matrix_is_not_merged(options: dict[str, Any]) -> None:
    part = shaken(Part(), BottleneckConfig(**options))
    before = part(X)
    with pytest.raises(ValueError, match="cannot be written into the weights") as error:
        stack_of(part).merge()
    assert one_sentence(str(error.value)) and torch.equal(part(X), before)


# -- saving, and plain peft -----------------------------------------------------------------------------------------

SAVED = {
    "sequential": BottleneckConfig(target_modules=["down_proj"], size=4, scaling="learned", gate=True, alpha=2.0),
    "parallel": BottleneckConfig(
        target_modules=["down_proj"],
        size=4,
        placement="parallel",
        inputs={f"model.layers.{i}.mlp.down_proj": f"model.layers.{i}.mlp.gate_proj" for i in range(3)},
    ),
    "kronecker": compacter(),
}


@pytest.mark.parametrize("kind", SAVED)
def test_it_is_loaded_by_this_package_and_by_plain_peft(kind: str, tmp_path: Path, tokens: Tensor) -> None:
    model = shaken(tiny("llama"), copy.deepcopy(SAVED[kind]))
    stack_of(model).scale(0.5)
    expected = model(tokens).logits
    save_adapter(model, tmp_path)
    ours = tiny("llama")
    load_adapter(ours, tmp_path)
    assert torch.equal(ours(tokens).logits, expected)
    assert torch.equal(PeftModel.from_pretrained(tiny("llama"), tmp_path)(tokens).logits, expected)
    assert not torch.equal(expected, tiny("llama")(tokens).logits)


def test_plain_peft_trains_saves_and_unloads_it(tmp_path: Path, tokens: Tensor) -> None:
    base = tiny("llama")(tokens).logits
    model: Any = get_peft_model(tiny("llama"), copy.deepcopy(SAVED["parallel"]))
    assert torch.equal(model(tokens).logits, base)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(trained) == 3 * 4
    optimizer = torch.optim.SGD(trained, lr=1.0)
    model(tokens, labels=tokens).loss.backward()
    optimizer.step()
    expected = model.eval()(tokens).logits
    model.save_pretrained(tmp_path)
    assert torch.equal(PeftModel.from_pretrained(tiny("llama"), tmp_path)(tokens).logits, expected)
    assert torch.equal(model.unload()(tokens).logits, base) and not torch.equal(expected, base)


# -- wrong use ------------------------------------------------------------------------------------------------------


class Convolution(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Conv1d(2, 2, 1)


class Torch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2)


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (Convolution, SEQUENTIAL, r"^last is a convolution, and a bottleneck adapts matrices\.$"),
        (
            Torch,
            {"target_modules": ["out_proj"], "size": 2},
            r"^attention\.out_proj is never called, since nn\.Multihead",
        ),
        (Part, {"size": 2}, r"^Part has no block with a feed-forward part: name the target_modules\.$"),
        (Part, {**PARALLEL, "inputs": {"last": "frist"}}, r"^The model has no module 'frist', which the parallel"),
        (Part, {**STREAM, "outputs": {"last": "bock"}}, r"^The model has no module 'bock', which the stream adapter"),
        (Part, {**STREAM, "outputs": {"first": "last"}}, r"^outputs and norms name no module for last: name one"),
    ],
    ids=["convolution", "torch's attention", "no target", "unknown input", "unknown output", "no output"],
)
def test_what_cannot_be_adapted_is_one_sentence(model: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        stack_of(model()).add(BottleneckConfig(**options))
    assert one_sentence(str(error.value))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 1, "reduction": 1}, r"^Give size or reduction, got size=1 and reduction=1\.$"),
        ({"size": 0}, r"^The bottleneck's size must be positive, got 0\.$"),
        ({"reduction": -1}, r"^The bottleneck's reduction must be positive, got -1\.$"),
        ({"size": 1, "activation": "relo"}, r"^activation must be one of relu, .*, got 'relo'\.$"),
        (
            {"size": 1, "placement": "beside"},
            r"^placement must be one of sequential, parallel, stream, got 'beside'\.$",
        ),
        ({"size": 1, "drop_path": 1.0}, r"^drop_path must be in \[0, 1\), got 1\.0\.$"),
        ({"size": 1, "inputs": {"a": "b"}}, r"^Only a parallel adapter has inputs of its own, and this one is seq"),
        (
            {"size": 1, "placement": "stream"},
            r"^outputs or norms and the placement 'stream' go together, got outputs=None",
        ),
        (
            {"size": 1, "outputs": {"a": "b"}},
            r"^outputs or norms and the placement 'stream' go together, got outputs=\{",
        ),
        (
            {"size": 1, "reads": "input"},
            r"^With the placement 'sequential' an adapter reads output, got reads='input'\.$",
        ),
        ({"size": 1, "kronecker": -2}, r"^kronecker must not be negative, got -2\.$"),
        ({"size": 2, "kronecker": 2, "init": "bert"}, r"^Kronecker factors begin as lora, mam or glorot, not as bert"),
    ],
)
def test_wrong_settings_are_refused_at_once(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        BottleneckConfig(target_modules=["last"], **options)
    assert one_sentence(str(error.value))


@pytest.mark.parametrize("kind", ["gpt2", "llama", "t5", "bert"])
def test_without_targets_and_size_every_feed_forward_part_has_one_of_a_sixteenth_of_its_width(kind: str) -> None:
    model = get_peft_model(tiny(kind), BottleneckConfig())
    ends = [span.last for span in part_ends(tiny(kind), attention=False)]
    assert model.peft_config["default"].target_modules == ends
    for layer in layers(model):
        inputs, outputs = matrix_shape(layer.base_layer)
        assert (layer.in_features, layer.out_features) == (inputs, outputs)
        assert layer.bottleneck["default"].down.out_features == max(1, outputs // 16)


def test_weights_that_would_not_be_finite_are_refused_in_the_words_of_peft() -> None:
    model = get_peft_model(Part(), BottleneckConfig(**SEQUENTIAL, **LINEAR))
    for layer in layers(model):
        layer.bottleneck["default"].up.weight.data.fill_(torch.nan)
    with pytest.raises(
        ValueError, match=r"^NaNs detected in the merged weights\. The adapter default seems to be brok"
    ):
        model.merge_and_unload(safe_merge=True)
