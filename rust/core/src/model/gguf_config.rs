//! GGUF metadata as the configuration a Hugging Face checkpoint of the same model would carry.

use crate::error::Error;
use crate::load::{Checkpoint, FormatError, Table, Value as Field};
use serde_json::{Map, Value, json};

/// What llama.cpp calls routers that weigh by a sigmoid.
const SIGMOID: u64 = 2;
/// No key of configurations: whether llama.cpp has written the maps from a latent to keys and to values apart.
pub(super) const SPLIT_LATENT: &str = "farthing_split_latent";
/// Likewise the inputs of Qwen3-Next's delta rule, by what they are for.
pub(super) const SPLIT_INPUTS: &str = "farthing_split_inputs";

/// What the metadata says, under the names of `config.json`.
pub(super) fn translate(gguf: &Table, checkpoint: &Checkpoint) -> Result<Map<String, Value>, Error> {
    let architecture: &str = gguf.require("general.architecture")?;
    let model_type = match architecture {
        "llama" | "qwen2" | "qwen3" | "smollm3" | "lfm2" | "olmoe" | "granite" | "granitemoe" => architecture,
        "gemma3" => "gemma3_text",
        "qwen35" => "qwen3_5_text",
        "qwen2moe" => "qwen2_moe",
        "qwen3moe" => "qwen3_moe",
        "gpt-oss" => "gpt_oss",
        "lfm2moe" => "lfm2_moe",
        "qwen3next" => "qwen3_next",
        "deepseek2" => "deepseek_v3",
        other => {
            return Err(Error::unsupported(
                format!("GGUF architecture {other:?}"),
                "the architectures llama, smollm3, qwen2, qwen3, qwen35, gemma3, lfm2, granite, qwen2moe, qwen3moe, qwen3next, \
                 olmoe, granitemoe, lfm2moe, deepseek2 and gpt-oss load",
            ));
        }
    };
    let listed_heads = matches!(architecture, "lfm2" | "lfm2moe");
    let mut config = Map::new();
    config.insert("model_type".into(), json!(model_type));
    for (key, name) in [
        ("embedding_length", "hidden_size"),
        ("feed_forward_length", "intermediate_size"),
        ("block_count", "num_hidden_layers"),
        ("attention.head_count", "num_attention_heads"),
        ("attention.head_count_kv", "num_key_value_heads"),
        ("attention.key_length", "head_dim"),
        ("attention.layer_norm_rms_epsilon", "rms_norm_eps"),
        ("shortconv.l_cache", "conv_L_cache"),
        ("full_attention_interval", "full_attention_interval"),
        ("ssm.conv_kernel", "linear_conv_kernel_dim"),
        ("ssm.state_size", "linear_key_head_dim"),
        ("ssm.group_count", "linear_num_key_heads"),
        ("ssm.time_step_rank", "linear_num_value_heads"),
        ("attention.sliding_window", "sliding_window"),
        ("context_length", "max_position_embeddings"),
        ("rope.freq_base", "rope_theta"),
        ("rope.dimension_count", "rotary_dim"),
        ("final_logit_softcapping", "final_logit_softcapping"),
        ("expert_count", "num_experts"),
        ("expert_used_count", "num_experts_per_tok"),
        ("expert_feed_forward_length", "moe_intermediate_size"),
        ("expert_shared_feed_forward_length", "shared_expert_intermediate_size"),
        ("attention.scale", "attention_multiplier"),
        ("embedding_scale", "embedding_multiplier"),
        ("residual_scale", "residual_multiplier"),
        ("logit_scale", "logits_scaling"),
        ("leading_dense_block_count", "first_k_dense_replace"),
        ("attention.q_lora_rank", "q_lora_rank"),
        ("attention.kv_lora_rank", "kv_lora_rank"),
        ("attention.value_length_mla", "v_head_dim"),
        ("expert_shared_count", "n_shared_experts"),
        ("expert_group_count", "n_group"),
        ("expert_group_used_count", "topk_group"),
        ("expert_weights_scale", "routed_scaling_factor"),
    ] {
        let key = format!("{architecture}.{key}");
        if let Some(field) = gguf.get(&key).filter(|_| !listed_heads || name != "num_key_value_heads") {
            let wrong = || FormatError::Config { key, got: field.describe(), expected: "one number".to_owned() };
            config.insert(name.into(), number(field).ok_or_else(wrong)?);
        }
    }
    // Files state the rotated width, configurations its share of a head.
    let rotated = config.remove("rotary_dim").and_then(|value| value.as_u64());
    if let (Some(rotated), Some(head_dim)) =
        (rotated, config.get("head_dim").and_then(Value::as_u64).filter(|&head_dim| head_dim > 0))
        && rotated < head_dim
    {
        config.insert("partial_rotary_factor".into(), json!(rotated as f64 / head_dim as f64));
    }
    let vocab = checkpoint.tensor("token_embd.weight").map_or(0, |tensor| tensor.shape().first().copied().unwrap_or(0));
    config.insert("vocab_size".into(), json!(vocab));
    config.insert("tie_word_embeddings".into(), json!(checkpoint.tensor("output.weight").is_none()));
    if config.get("num_experts").and_then(Value::as_u64) == Some(0) {
        // Dense models of some converters say so.
        config.remove("num_experts");
        config.remove("num_experts_per_tok");
    }
    if config.contains_key("num_experts") {
        // Which layers have no experts is told by the tensors alone.
        let layers = config.get("num_hidden_layers").and_then(Value::as_u64).unwrap_or(0).min(4096);
        let dense = |layer: &u64| checkpoint.tensor(&format!("blk.{layer}.ffn_gate_inp.weight")).is_none();
        config.insert("mlp_only_layers".into(), (0..layers).filter(dense).collect());
    }
    let float = |key: &str| gguf.get(&format!("{architecture}.{key}")).and_then(number);
    match gguf.read::<&str>(&format!("{architecture}.rope.scaling.type"))? {
        None | Some("none") => {}
        Some(kind) => {
            let mut scaling = Map::new();
            scaling.insert("rope_type".into(), json!(kind));
            for (key, name) in [
                ("rope.scaling.factor", "factor"),
                ("rope.scaling.original_context_length", "original_max_position_embeddings"),
                ("rope.scaling.yarn_beta_fast", "beta_fast"),
                ("rope.scaling.yarn_beta_slow", "beta_slow"),
            ] {
                if let Some(value) = float(key) {
                    scaling.insert(name.into(), value);
                }
            }
            config.insert("rope_scaling".into(), Value::Object(scaling));
        }
    }
    match architecture {
        // llama.cpp always normalises these weights, and never those of qwen2moe and olmoe.
        "qwen3moe" => {
            config.insert("norm_topk_prob".into(), json!(true));
        }
        "gpt-oss" => {
            // Converted from a configuration that says so.
            if let Some(Value::Object(scaling)) = config.get_mut("rope_scaling") {
                scaling.insert("truncate".into(), json!(false));
            }
            // Published models are as wide between as their experts are.
            if let Some(width) = config.get("moe_intermediate_size").cloned() {
                config.insert("intermediate_size".into(), width);
            }
        }
        "llama" | "smollm3" | "granite" | "granitemoe" => {
            // These files name no biases: the tensors' presence does.
            let present = |name: &str| checkpoint.tensor(name).is_some();
            config.insert("attention_bias".into(), json!(present("blk.0.attn_q.bias")));
            config.insert("mlp_bias".into(), json!(present("blk.0.ffn_gate.bias")));
            if architecture == "llama" && config.contains_key("num_experts") {
                config.insert("model_type".into(), json!("mixtral"));
            } else if architecture == "llama" && config.contains_key("sliding_window") {
                config.insert("model_type".into(), json!("mistral"));
            }
        }
        "lfm2" | "lfm2moe" => {
            // Heads of keys are listed for each layer: none where it does not attend.
            let heads: Vec<usize> = gguf.require(&format!("{architecture}.attention.head_count_kv"))?;
            let kind = |&heads: &usize| if heads > 0 { "full_attention" } else { "conv" };
            config.insert("layer_types".into(), heads.iter().map(kind).collect());
            config.insert("num_key_value_heads".into(), json!(heads.iter().max()));
            config.insert("block_auto_adjust_ff_dim".into(), json!(false));
            if let Some(epsilon) = config.remove("rms_norm_eps") {
                config.insert("norm_eps".into(), epsilon);
            }
            if architecture == "lfm2moe" {
                let dense = config.remove("first_k_dense_replace").unwrap_or(json!(0));
                let biased =
                    (0..heads.len()).any(|layer| checkpoint.tensor(&format!("blk.{layer}.exp_probs_b.bias")).is_some());
                config.insert("num_dense_layers".into(), dense);
                config.insert("use_expert_bias".into(), json!(biased));
            }
        }
        "deepseek2" => {
            // DeepSeek-V2, and V2-Lite, whose weights are a softmax, are of the same architecture.
            let gating = float("expert_gating_func").and_then(|value| value.as_u64()).unwrap_or(0);
            if gating != SIGMOID {
                let got = format!("GGUF architecture \"deepseek2\" with expert_gating_func {gating}");
                return Err(Error::unsupported(got, "2, the sigmoid of DeepSeek-V3, works"));
            }
            let count = |key: &str| float(key).and_then(|value| value.as_u64());
            let (head, rotated) = (count("attention.key_length_mla").unwrap_or(0), rotated.unwrap_or(0));
            config.remove("partial_rotary_factor");
            config.remove("mlp_only_layers");
            let heads = config.get("num_attention_heads").cloned().unwrap_or_default();
            config.insert("num_key_value_heads".into(), heads);
            config.insert("head_dim".into(), json!(rotated));
            config.insert("qk_rope_head_dim".into(), json!(rotated));
            config.insert("qk_nope_head_dim".into(), json!(head.saturating_sub(rotated)));
            config.insert(
                "norm_topk_prob".into(),
                json!(gguf.read::<bool>("deepseek2.expert_weights_norm")?.unwrap_or(false)),
            );
            for key in ["n_group", "topk_group"] {
                config.entry(key).or_insert(json!(1));
            }
            config.insert(SPLIT_LATENT.into(), json!(checkpoint.tensor("blk.0.attn_k_b.weight").is_some()));
            // A tenth of what the configuration says, which in published models is both of its magnitudes.
            if let (Some(tenth), Some(Value::Object(scaling))) = (
                float("rope.scaling.yarn_log_multiplier").and_then(|value| value.as_f64()),
                config.get_mut("rope_scaling"),
            ) {
                scaling.insert("mscale".into(), json!(10.0 * tenth));
                scaling.insert("mscale_all_dim".into(), json!(10.0 * tenth));
            }
        }
        "qwen3next" => {
            let count = |key: &str| float(key).and_then(|value| value.as_u64());
            if let (Some(inner), Some(heads)) = (count("ssm.inner_size"), count("ssm.time_step_rank")) {
                config.insert("linear_value_head_dim".into(), json!(inner.checked_div(heads).unwrap_or(0)));
            }
            config.insert("norm_topk_prob".into(), json!(true));
            config.insert(SPLIT_INPUTS.into(), json!(true));
            config.entry("num_experts").or_insert(json!(0));
        }
        "qwen35" => {
            let count = |key: &str| float(key).and_then(|value| value.as_u64());
            // Value heads share their width; layers that only draft come last and are left out.
            if let (Some(inner), Some(heads)) = (count("ssm.inner_size"), count("ssm.time_step_rank")) {
                config.insert("linear_value_head_dim".into(), json!(inner.checked_div(heads).unwrap_or(0)));
            }
            if let (Some(all), Some(drafting)) = (count("block_count"), count("nextn_predict_layers")) {
                config.insert("num_hidden_layers".into(), json!(all.saturating_sub(drafting)));
            }
            if let Some(recurrent) = gguf.read::<Vec<bool>>("qwen35.attention.recurrent_layers")? {
                let kind = |recurrent: &bool| if *recurrent { "linear_attention" } else { "full_attention" };
                let layers = config.get("num_hidden_layers").and_then(Value::as_u64).unwrap_or(0) as usize;
                config.insert("layer_types".into(), recurrent.iter().take(layers).map(kind).collect());
            }
        }
        "gemma3" => {
            // The 27B model alone scales by the width per head of the stream, not of the heads.
            let count = |name: &str| config.get(name).and_then(Value::as_u64).unwrap_or(0);
            let per_head = count("hidden_size") / count("num_attention_heads").max(1);
            let scalar = if count("num_hidden_layers") == 62 { per_head } else { count("head_dim") };
            config.insert("query_pre_attn_scalar".into(), json!(scalar));
        }
        _ => {}
    }
    Ok(config)
}

/// A number as JSON holds it; nothing for other types.
fn number(field: &Field) -> Option<Value> {
    Some(match *field {
        Field::U8(value) => json!(value),
        Field::I8(value) => json!(value),
        Field::U16(value) => json!(value),
        Field::I16(value) => json!(value),
        Field::U32(value) => json!(value),
        Field::I32(value) => json!(value),
        Field::U64(value) => json!(value),
        Field::I64(value) => json!(value),
        Field::F32(value) => json!(value),
        Field::F64(value) => json!(value),
        Field::Bool(_) | Field::String(_) | Field::Array(_) => return None,
    })
}
