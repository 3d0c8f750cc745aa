"""The README's Python runs as it stands."""

import re
from pathlib import Path

import pytest

README = Path(__file__).parents[2] / "README.md"


@pytest.mark.usefixtures("smollm2")
def test_the_example_runs(capsys):
    first, _ = examples()
    exec(compile(first, str(README), "exec"), {})
    printed = capsys.readouterr().out
    assert "Paris" in printed
    assert "weights read" in printed


def test_the_example_for_transformers_runs():
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 100}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape, **heads)).eval()
    inputs = {"input_ids": torch.arange(8)[None], "max_new_tokens": 2, "do_sample": False}
    given = {"torch": torch, "model": model, "inputs": inputs, "w": torch.randn(32, 128)}
    _, second = examples()
    before = model(inputs["input_ids"]).logits
    # The reader brings a model; the one here is tiny.
    lines = [line for line in second.splitlines() if not line.startswith("model = ")]
    exec(compile("\n".join(lines), str(README), "exec"), given)
    assert torch.equal(model(inputs["input_ids"]).logits, before)
    assert given["m"].shape == (32, 128)


def examples() -> list[str]:
    return re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)
