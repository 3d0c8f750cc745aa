"""On-policy self-distillation: the loss, the schedule, the alignment of pairs, and the loop with its rollouts."""

from __future__ import annotations

import copy

import pytest
import torch
from farthing.errors import UnsupportedError
from farthing.reasoning import (
    DIFFICULTY_AWARE,
    EngineRollouts,
    Opsdc,
    PromptPair,
    Schedule,
    States,
    TransformersRollouts,
    chat_pairs,
    opsdc_loss,
)
from farthing.reasoning.training import final_states
from torch.nn import functional as F

CHARACTERS = "_vcd>=?#$ABC01234"
END = CHARACTERS.index("$")


def tokenizer():
    """One token for each character."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(CHARACTERS)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="$", pad_token="_")


def student(seed=0):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(
        vocab_size=len(CHARACTERS),
        max_position_embeddings=64,
        bos_token_id=None,
        eos_token_id=END,
        pad_token_id=0,
        initializer_range=0.3,
        **sizes,
    )
    return LlamaForCausalLM(config)


def prompts(question):
    return [1, *question, 4], [2, *question, 4]


QUESTIONS = [[9, 12, 10, 13], [9, 14, 10, 15], [9, 16, 10, 12, 11, 13], [9, 12]]


def recorded(model, asked, seed):  # noqa: ARG001
    generator = torch.Generator().manual_seed(seed)
    lengths = [5, 9, 2, 7]
    return [torch.randint(5, 17, (n,), generator=generator).tolist() for n, _ in zip(lengths, asked, strict=True)]


def plain_steps(model, steps, lr, refresh=None):
    """The algorithm without any of our parts; returns its losses."""
    teacher, losses = copy.deepcopy(model).eval(), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01)
    for step in range(steps):
        answers = recorded(model, QUESTIONS, step)
        total, loss = sum(map(len, answers)), 0.0
        for question, answer in zip(QUESTIONS, answers, strict=True):
            rows = []
            for side, prompt in zip((model, teacher), prompts(question), strict=True):
                logits = side(input_ids=torch.tensor([prompt + answer]), use_cache=False).logits[0]
                rows.append(logits[len(prompt) - 1 : -1].log_softmax(-1))
            loss = loss + F.kl_div(rows[1].detach(), rows[0], reduction="sum", log_target=True) / total
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        if refresh and (step + 1) % refresh == 0:
            teacher.load_state_dict(model.state_dict())
    return losses


def test_the_loss_is_the_mean_divergence_of_the_rows_that_count():
    generator = torch.Generator().manual_seed(0)
    hidden, weight, teacher = (torch.randn(*shape, generator=generator) for shape in ((2, 5, 8), (30, 8), (2, 5, 8)))
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 0, 0, 0, 0]])
    hidden.requires_grad_()
    p, q = (hidden @ weight.t()).log_softmax(-1), (teacher @ weight.t()).log_softmax(-1)
    wanted = ((p.exp() * (p - q)).sum(-1) * mask).sum() / mask.sum()
    (slope,) = torch.autograd.grad(wanted, hidden)
    logits = hidden @ weight.t()
    for loss in (
        opsdc_loss(logits, teacher @ weight.t(), mask),
        opsdc_loss(States(hidden, weight), States(teacher, weight), mask),
    ):
        assert loss.item() == pytest.approx(wanted.item(), abs=1e-6)
        assert torch.allclose(torch.autograd.grad(loss, hidden, retain_graph=True)[0], slope, atol=1e-6)
    assert opsdc_loss(logits, logits.detach(), torch.zeros(2, 5)).item() == 0.0
    for kind in ("jsd", "forward_kl"):
        both = [
            opsdc_loss(logits, teacher @ weight.t(), mask, kind=kind),
            opsdc_loss(States(hidden, weight), States(teacher, weight), mask, kind=kind),
        ]
        assert both[0].item() == pytest.approx(both[1].item(), abs=1e-6)
    with pytest.raises(ValueError, match="mask"):
        opsdc_loss(logits, logits, mask[:, :3])
    with pytest.raises(ValueError, match="both sides"):
        opsdc_loss(logits, States(teacher, weight))
    with pytest.raises(ValueError, match="estimator"):
        opsdc_loss(logits, logits, estimator="some")


def test_the_sampled_estimator_has_the_gradient_of_the_full_one_on_average():
    generator = torch.Generator().manual_seed(1)
    hidden, weight, teacher = (torch.randn(*shape, generator=generator).double() for shape in ((1, 4), (6, 4), (1, 4)))
    hidden.requires_grad_()
    states = States(hidden, weight), States(teacher, weight)
    (wanted,) = torch.autograd.grad(opsdc_loss(*states), hidden)
    p = (hidden @ weight.t()).softmax(-1).detach()[0]
    slopes = []
    for token in range(6):
        tokens = torch.tensor([token])
        both = [
            opsdc_loss(*states, estimator="sampled", token_ids=tokens),
            opsdc_loss(hidden @ weight.t(), teacher @ weight.t(), estimator="sampled", token_ids=tokens),
        ]
        assert both[0].item() == pytest.approx(both[1].item(), abs=1e-12)
        slopes.append([torch.autograd.grad(loss, hidden)[0] for loss in both])
    for way in (0, 1):
        mean = sum(p[token] * slopes[token][way] for token in range(6))
        assert torch.allclose(mean, wanted, atol=1e-10)


def test_schedule():
    model, teacher = student(0), student(1)
    schedule = Schedule(3)
    assert [schedule.after(step, teacher, model) for step in (1, 2)] == [False, False]
    assert not torch.equal(teacher.lm_head.weight, model.lm_head.weight)
    assert schedule.after(3, teacher, model)
    assert torch.equal(teacher.lm_head.weight, model.lm_head.weight)
    assert not Schedule(None).due(50)
    with pytest.raises(ValueError, match="every"):
        Schedule(0)


def test_prompts_hold_the_question_whatever_is_in_it():
    class Words:
        def apply_chat_template(self, messages, **options):
            assert options == {"tokenize": False, "add_generation_prompt": True, "enable_thinking": True}
            return messages[0]["content"] + " Answer:"

        def __call__(self, text, add_special_tokens):
            assert not add_special_tokens
            return {"input_ids": text.split()}

    plain, concise = chat_pairs(Words(), DIFFICULTY_AWARE, enable_thinking=True)("What is {x}?")
    assert plain[-4:] == concise[-4:] == ["What", "is", "{x}?", "Answer:"]
    assert len(concise) > len(plain)
    with pytest.raises(ValueError, match="question"):
        PromptPair("no place", "{question}")


@pytest.mark.parametrize("family", ["llama", "granite", "gemma2", "cohere", "qwen2"])
def test_states_and_head_are_the_logits(family):
    import transformers

    options = {
        "granite": ("GraniteConfig", {"logits_scaling": 4.0}),
        "gemma2": ("Gemma2Config", {"final_logit_softcapping": 3.0, "head_dim": 8}),
        "cohere": ("CohereConfig", {"logit_scale": 0.25}),
        "llama": ("LlamaConfig", {}),
        "qwen2": ("Qwen2Config", {"tie_word_embeddings": True}),
    }
    name, extra = options[family]
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = getattr(transformers, name)(vocab_size=40, num_key_value_heads=2, pad_token_id=0, **sizes, **extra)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    texts = [([1, 2, 3], [4, 5]), ([6], [7, 8, 9, 10])]
    with torch.no_grad():
        states = final_states(model, texts)
        logits = states.scale * F.linear(states.hidden, states.weight, states.bias)
        if states.softcap is not None:
            logits = states.softcap * torch.tanh(logits / states.softcap)
        wanted = [
            model(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1] for prompt, answer in texts
        ]
    assert torch.allclose(logits, torch.cat(wanted), atol=1e-5)


def test_steps_are_those_of_the_plain_loop():
    base = student()
    trainer = Opsdc(copy.deepcopy(base), prompts, recorded, schedule=Schedule(4), lr=1e-3, filter=0.0, micro_batch=3)
    reports = [trainer.step(QUESTIONS) for _ in range(10)]
    wanted = plain_steps(copy.deepcopy(base), 10, 1e-3, refresh=4)
    assert [report.loss for report in reports] == pytest.approx(wanted, abs=1e-4)
    assert [report.step for report in reports if report.renewed] == [4, 8]
    assert reports[0].loss > 0.01
    assert reports[0].tokens == pytest.approx(23 / 4)
    assert not any(report.skipped or report.dropped for report in reports)
    assert 0 < reports[0].entropy < 3


def test_the_loss_does_not_depend_on_micro_batches_and_estimators_run():
    base = student()
    losses = [
        Opsdc(copy.deepcopy(base), prompts, recorded, micro_batch=size).step(QUESTIONS).loss for size in (1, 2, 4)
    ]
    assert losses == pytest.approx([losses[0]] * 3, abs=1e-6)
    report = Opsdc(copy.deepcopy(base), prompts, recorded, estimator="sampled", micro_batch=2).step(QUESTIONS)
    assert report.norm > 0
    assert not report.skipped


def test_pairs_are_dropped_whole_and_bad_steps_skipped():
    base = student()
    trainer = Opsdc(copy.deepcopy(base), prompts, recorded, limit=14)
    report = trainer.step(QUESTIONS)
    assert report.dropped == 1
    assert report.tokens == pytest.approx((5 + 2 + 7) / 3)
    nothing = Opsdc(copy.deepcopy(base), prompts, lambda *_: [[], [], [], []]).step(QUESTIONS)
    assert nothing.skipped
    assert nothing.dropped == 4
    trainer = Opsdc(copy.deepcopy(base), prompts, recorded)
    with torch.no_grad():
        trainer.teacher.lm_head.weight[3, 0] = float("nan")
    before = trainer.model.lm_head.weight.clone()
    assert trainer.step(QUESTIONS).skipped
    assert torch.equal(trainer.model.lm_head.weight, before)


def test_training_goes_on_where_it_was_saved():
    first = Opsdc(student(), prompts, recorded, lr=1e-3, schedule=Schedule(2))
    for _ in range(3):
        first.step(QUESTIONS)
    saved = copy.deepcopy(first.state_dict())
    wanted = [first.step(QUESTIONS).loss for _ in range(2)]
    second = Opsdc(student(5), prompts, recorded, lr=1e-3, schedule=Schedule(2))
    second.load_state_dict(saved)
    assert [second.step(QUESTIONS).loss for _ in range(2)] == wanted


def test_a_teacher_of_its_own_is_distilled():
    trainer = Opsdc(
        student(), lambda q: (prompts(q)[0],) * 2, recorded, teacher=student(1), schedule=Schedule(None), lr=3e-3
    )
    losses = [trainer.step(QUESTIONS).loss for _ in range(30)]
    assert losses[-1] < 0.5 * losses[0]
    with pytest.raises(ValueError, match="Schedule"):
        Opsdc(student(), prompts, recorded, teacher=student(1))


def test_a_head_that_is_not_understood_is_refused():
    model = student()
    forward = model.forward
    model.forward = lambda *args, **options: _doubled(forward(*args, **options))
    with pytest.raises(UnsupportedError, match="logits"):
        Opsdc(model, prompts, recorded, teacher=student(), schedule=Schedule(None))


def _doubled(output):
    output.logits = output.logits * 2
    return output


def test_autocast_trains():
    trainer = Opsdc(student(), prompts, recorded, autocast=torch.bfloat16, lr=1e-3)
    assert trainer.teacher.lm_head.weight.dtype == torch.bfloat16
    exact = Opsdc(student(), prompts, recorded, lr=1e-3)
    mine, wanted = trainer.step(QUESTIONS), exact.step(QUESTIONS)
    assert mine.loss == pytest.approx(wanted.loss, rel=0.1)
    assert trainer.model.lm_head.weight.dtype == torch.float32


def test_rollouts_answer_as_the_model_stands():
    model = student()
    asked = [prompts(question)[0] for question in QUESTIONS]
    engine = EngineRollouts(
        tokenizer(), every=2, max_new_tokens=12, dtype=torch.float32, weights="f32", temperature=1.0
    )
    first = engine(model, asked, 0)
    assert first == EngineRollouts(tokenizer(), max_new_tokens=12, dtype=torch.float32, weights="f32")(model, asked, 0)
    for answer in (*first, *TransformersRollouts(12)(model, asked, 0)):
        assert 1 <= len(answer) <= 12
        assert END not in answer[:-1]
        assert len(answer) == 12 or answer[-1] == END
    assert TransformersRollouts(12)(model, asked, 3) == TransformersRollouts(12)(model, asked, 3)
    with torch.no_grad():
        model.lm_head.weight[END] += 100 * model.lm_head.weight[END].sign()
        model.lm_head.weight.neg_()
    stale, fresh = engine(model, asked, 0), engine(model, asked, 0)
    assert stale == first
    assert fresh != first
