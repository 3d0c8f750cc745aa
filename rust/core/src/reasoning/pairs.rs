//! The markers that model families put around their thinking.

/// How a family marks its thinking.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pair {
    /// What opens the span.
    pub start: &'static str,
    /// What ends it.
    pub end: &'static str,
    /// What is written to end it by force, up to the first word of the answer.
    pub close: &'static str,
    /// Between the end and the answer, part of neither.
    pub header: Option<&'static str>,
    /// Tokens that a vocabulary has when its model uses the pair.
    pub tokens: &'static [&'static str],
}

const fn tags(start: &'static str, end: &'static str, close: &'static str, tokens: &'static [&'static str]) -> Pair {
    Pair { start, end, close, header: None, tokens }
}

/// Pairs that are recognised by themselves, the first that a vocabulary has.
pub const PAIRS: &[Pair] = &[
    Pair {
        start: "<|channel|>analysis<|message|>",
        end: "<|end|>",
        close: "<|end|><|start|>assistant<|channel|>final<|message|>",
        header: Some("<|start|>assistant<|channel|>final<|message|>"),
        tokens: &["<|channel|>", "<|message|>", "<|start|>", "<|end|>"],
    },
    tags("<|channel>thought\n", "<channel|>", "<channel|>", &["<|channel>", "<channel|>"]),
    tags("<think>", "</think>", "</think>\n\n", &["<think>", "</think>"]),
    tags("[THINK]", "[/THINK]", "[/THINK]", &["[THINK]", "[/THINK]"]),
    tags("<seed:think>", "</seed:think>", "</seed:think>", &["<seed:think>", "</seed:think>"]),
    tags("<|START_THINKING|>", "<|END_THINKING|>", "<|END_THINKING|>", &["<|START_THINKING|>", "<|END_THINKING|>"]),
    tags("<thought>", "</thought>", "</thought>\n\n", &["<thought>", "</thought>"]),
    tags("◁think▷", "◁/think▷", "◁/think▷", &["◁think▷", "◁/think▷"]),
    tags("<longcat_think>", "</longcat_think>", "</longcat_think>\n", &["<longcat_think>", "</longcat_think>"]),
];

/// Tool calls, inside which nothing is cut at the end of a sentence.
pub(super) const TOOLS: &[(&str, &str)] = &[("<tool_call>", "</tool_call>")];

/// The hand-over message of a forced end, unless another is given.
pub(super) const MESSAGE: &str =
    "\n\nThere is no time left to think, so here is the answer that follows from the above.\n";
