"""One mixture-of-experts layer beside transformers' own `grouped_mm` in bfloat16, at the shapes of real models.

``python -m benches.moe_layer [--shapes olmoe ...] [--weights int4 ternary] [--threads 1 2] [--tokens 1 8 64 256]``

Each round draws new experts uniformly, takes the next of several copies of the layer, so that weights come from memory,
and runs every way once; figures are medians. Outputs are checked against the dequantised weights first. Each number of
threads is a process of its own, in which both use the threads of torch. Every fourth expert has the same weights: that
changes no time.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from time import perf_counter

import torch
from farthing._core import share_threads
from farthing.moe import Expert, PackedExperts
from torch.nn import functional as F

# What the copies of a layer have together at least, in bytes; several times any cache.
COLD = 800_000_000
DISTINCT = 4


@dataclass(frozen=True)
class Shape:
    """Sizes of a layer."""

    hidden: int
    inner: int
    experts: int
    choices: int
    gpt_oss: bool = False


SHAPES = {
    "olmoe": Shape(2048, 1024, 64, 8),
    "qwen3-30b": Shape(2048, 768, 128, 8),
    "gpt-oss-20b": Shape(2880, 2880, 32, 4, gpt_oss=True),
    "mistral-small-4": Shape(4096, 2048, 128, 4),
}


def module_of(shape: Shape) -> torch.nn.Module:
    """The experts module of transformers with random bfloat16 weights."""
    from transformers import GptOssConfig, MixtralConfig
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    config_class, module_class = (GptOssConfig, GptOssExperts) if shape.gpt_oss else (MixtralConfig, MixtralExperts)
    config = config_class(
        hidden_size=shape.hidden, intermediate_size=shape.inner, num_local_experts=shape.experts, hidden_act="silu"
    )
    config._experts_implementation = "grouped_mm"
    with torch.device("meta"):
        module = module_class(config)
    module = module.bfloat16().to_empty(device="cpu").requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for weight in module.parameters():
        some = torch.randn(DISTINCT, *weight.shape[1:], generator=generator) * 0.02
        for start in range(0, shape.experts, DISTINCT):
            weight[start : start + DISTINCT] = some
    return module


def packed_of(module: torch.nn.Module, weights: str, group: int) -> PackedExperts:
    """The same experts, packed; equal ones are packed once and copied."""
    from farthing.hf import describe_experts

    experts = describe_experts(module)
    options = {"activation": experts.activation, "alpha": experts.alpha, "limit": experts.limit}
    some = PackedExperts(
        (experts[index] for index in range(DISTINCT)), weights, group=group, activations="a8", **options
    )
    return PackedExperts((some[index % DISTINCT] for index in range(len(experts))), **options)


def definition(packed: PackedExperts, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """The layer in float32, on dequantised weights."""
    word, alpha, limit = packed.activation
    out = torch.zeros(x.shape)
    for e in torch.unique(ids).tolist():
        expert = packed[e]
        gate, up, down = (torch.from_numpy(matrix.dequantize()) for matrix in expert[:3])
        biases = [None if bias is None else torch.from_numpy(bias) for bias in Expert(*expert)[3:]]
        tokens, slots = torch.where(ids == e)
        rows = x[tokens].float()
        gate, up = F.linear(rows, gate, biases[0]), F.linear(rows, up, biases[1])
        if limit is not None:
            gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
        inner = (up + 1) * gate * torch.sigmoid(alpha * gate) if word == "swiglu" else F.silu(gate) * up
        out.index_add_(0, tokens, F.linear(inner, down, biases[2]) * weights[tokens, slots, None])
    return out


def check(name: str, got: torch.Tensor, wanted: torch.Tensor, bound: float) -> None:
    """Refuses to time a wrong result."""
    distance = float((got.float() - wanted).norm() / wanted.norm())
    if not distance <= bound:
        raise SystemExit(f"{name}: {distance:.1e} from the definition, expected at most {bound:.0e}; no timing")


def draw(shape: Shape, tokens: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states, distinct experts for each, and their weights."""
    x = torch.randn(tokens, shape.hidden, generator=generator).bfloat16()
    weights, ids = torch.rand(tokens, shape.experts, generator=generator).topk(shape.choices)
    return x, ids, weights / weights.sum(-1, keepdim=True)


def measure(name: str, formats: list[str], tokens: list[int], group: int, seconds: float) -> None:
    """Prints the table of one shape."""
    shape = SHAPES[name]
    module = module_of(shape)
    kinds = {weights: packed_of(module, weights, group) for weights in formats}
    one = sum(weight.nbytes for weight in module.parameters())
    modules = [module, *(module_of(shape) for _ in range(min(1, COLD // one)))]
    ways: dict[str, list[Callable]] = {"grouped_mm bf16": list(modules)}
    for weights, packed in kinds.items():
        copies = -(-COLD // packed.nbytes) - 1
        others = [PackedExperts(iter(packed), **_options(packed)) for _ in range(copies)]
        ways[weights] = [packed, *others]
    sizes = ", ".join(f"{weights} {packed.nbytes / 1e6:.0f} MB" for weights, packed in kinds.items())
    print(f"\n{name}: hidden {shape.hidden}, width {shape.inner}, {shape.choices} of {shape.experts} experts;", end=" ")
    print(f"bf16 {one / 1e6:.0f} MB, {sizes}; {torch.get_num_threads()} threads; medians in ms")
    heads = "".join(f"{weights:>10}{'ratio':>8}" for weights in formats)
    print(f"{'tokens':>6}{'grouped_mm':>12}{heads}{'rounds':>8}", flush=True)
    generator = torch.Generator().manual_seed(1)
    for count in tokens:
        few = draw(shape, min(count, 4), generator)
        for weights, packed in kinds.items():
            check(f"{name} {weights}", packed(*few), definition(packed, *few), 2e-2)
        exact = PackedExperts([_bf16(module, e) for e in range(DISTINCT)], "bf16", **_options(kinds[formats[0]]))
        folded = (few[0], few[1] % DISTINCT, few[2])
        check(f"{name} grouped_mm", module(*few), definition(exact, *folded), 2e-2)
        taken: dict[str, list[float]] = {way: [] for way in ways}
        start, turn = perf_counter(), -1
        while turn < 5 or (perf_counter() - start < seconds and turn < 400):
            given = draw(shape, count, generator)
            for way, layers in ways.items():
                layer = layers[turn % len(layers)]
                begin = perf_counter()
                layer(*given)
                if turn >= 0:
                    taken[way].append(perf_counter() - begin)
            turn += 1
        peer = 1e3 * median(taken["grouped_mm bf16"])
        ours = [1e3 * median(taken[weights]) for weights in formats]
        print(f"{count:>6}{peer:>12.2f}" + "".join(f"{time:>10.2f}{time / peer:>8.2f}" for time in ours), end="")
        print(f"{turn:>8}", flush=True)


def _options(packed: PackedExperts) -> dict[str, object]:
    return dict(zip(("activation", "alpha", "limit"), packed.activation, strict=True))


def _bf16(module: torch.nn.Module, index: int) -> Expert:
    from farthing.hf import describe_experts

    return describe_experts(module)[index]


def main() -> None:
    """Runs a process for each number of threads."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["olmoe"])
    parser.add_argument("--weights", nargs="+", default=["int4", "ternary"])
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 8, 64, 256])
    parser.add_argument("--group", type=int, default=128, help="inputs that share a scale, as far as they divide")
    parser.add_argument("--seconds", type=float, default=3.0, help="for each row of a table")
    arguments = parser.parse_args()
    if len(arguments.threads) > 1:
        given = sys.argv[1:]
        if "--threads" in given:
            start = given.index("--threads")
            del given[start : start + 1 + len(arguments.threads)]
        for threads in arguments.threads:
            subprocess.run([sys.executable, "-m", "benches.moe_layer", *given, "--threads", str(threads)], check=True)
        return
    torch.set_num_threads(arguments.threads[0])
    share_threads()
    with torch.inference_mode():
        for name in arguments.shapes:
            measure(name, arguments.weights, arguments.tokens, arguments.group, arguments.seconds)


if __name__ == "__main__":
    main()
