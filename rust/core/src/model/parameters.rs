//! How many parameters a description stands for.

use super::config::Config;
use super::feed_forward::FeedForwardSpec;

/// Numbers of weights in matrices; norms, biases and filters, a ten-thousandth of a model, are left out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Parameters {
    /// In all.
    pub total: u64,
    /// Of which one token is multiplied with: its experts only, and no embedding that is not also the head.
    pub active: u64,
}

impl Config {
    /// Counts what the description stands for, without a checkpoint.
    ///
    /// ```
    /// use farthing::model::config;
    ///
    /// let text = r#"{"model_type": "llama", "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1,
    ///     "num_attention_heads": 2, "vocab_size": 10}"#;
    /// let parameters = config::read(serde_json::from_str::<serde_json::Value>(text)?.as_object().unwrap())?.parameters();
    /// assert_eq!((parameters.total, parameters.active), (4 * 64 + 3 * 128 + 2 * 80, 4 * 64 + 3 * 128 + 80));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn parameters(&self) -> Parameters {
        let size = |rows: usize, columns: usize| rows as u64 * columns as u64;
        let embedding = size(self.vocab, self.hidden);
        let (mut total, mut active) = if self.tied { (embedding, embedding) } else { (2 * embedding, embedding) };
        for block in &self.blocks {
            for matrix in block.matrices(self.hidden) {
                total += size(matrix.rows, matrix.columns);
                active += size(matrix.rows, matrix.columns);
            }
            if let FeedForwardSpec::Sparse(spec) = &block.feed_forward {
                for kind in spec.kinds(self.hidden) {
                    total += size(kind.rows, kind.columns) * kind.count as u64;
                    active += size(kind.rows, kind.columns) * kind.used as u64;
                }
            }
        }
        Parameters { total, active }
    }
}

#[cfg(test)]
mod tests {
    use crate::model::config;
    use serde_json::json;

    /// Parameters in units of 10⁷, in all and for a token.
    fn parameters(config: &serde_json::Value) -> (u64, u64) {
        let parameters = config::read(config.as_object().unwrap()).unwrap().parameters();
        ((parameters.total + 5_000_000) / 10_000_000, (parameters.active + 5_000_000) / 10_000_000)
    }

    #[test]
    fn published_models_have_the_published_numbers() {
        // 119.0 B and about 6.1 B: 36 layers of 129 experts of 25.17 M, 28.1 M of attention and router, a head of 0.537 B.
        let small = json!({"model_type": "mistral4", "hidden_size": 4096, "intermediate_size": 12288, "vocab_size": 131_072,
            "num_hidden_layers": 36, "num_attention_heads": 32, "moe_intermediate_size": 2048, "n_routed_experts": 128,
            "num_experts_per_tok": 4, "kv_lora_rank": 256, "q_lora_rank": 1024, "qk_rope_head_dim": 64, "v_head_dim": 128,
            "qk_nope_head_dim": 64, "first_k_dense_replace": 0});
        assert_eq!(parameters(&small), (11_897, 610));
        // OLMoE-1B-7B.
        let olmoe = json!({"model_type": "olmoe", "hidden_size": 2048, "intermediate_size": 1024, "vocab_size": 50_304,
            "num_hidden_layers": 16, "num_attention_heads": 16, "num_experts": 64, "num_experts_per_tok": 8});
        assert_eq!(parameters(&olmoe), (692, 118));
        // Qwen3-30B-A3B.
        let qwen = json!({"model_type": "qwen3_moe", "hidden_size": 2048, "intermediate_size": 6144, "vocab_size": 151_936,
            "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128,
            "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768});
        assert_eq!(parameters(&qwen), (3_053, 304));
    }
}
