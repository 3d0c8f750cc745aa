//! GGUF metadata as the configuration a Hugging Face checkpoint of the same model would carry.

use crate::error::Error;
use crate::load::{Checkpoint, FormatError, Table, Value as Field};
use serde_json::{Map, Value, json};

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
        other => {
            return Err(Error::unsupported(
                format!("GGUF architecture {other:?}"),
                "the architectures llama, smollm3, qwen2, qwen3, qwen35, gemma3, lfm2, granite, qwen2moe, qwen3moe, olmoe, granitemoe \
                 and gpt-oss load",
            ));
        }
    };
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
    ] {
        let key = format!("{architecture}.{key}");
        if let Some(field) = gguf.get(&key).filter(|_| architecture != "lfm2" || name != "num_key_value_heads") {
            let wrong = || FormatError::Config { key, got: field.describe(), expected: "one number".to_owned() };
            config.insert(name.into(), number(field).ok_or_else(wrong)?);
        }
    }
    // Files state the rotated width, configurations its share of a head.
    if let (Some(rotated), Some(head_dim)) = (
        config.remove("rotary_dim").and_then(|value| value.as_u64()),
        config.get("head_dim").and_then(Value::as_u64).filter(|&head_dim| head_dim > 0),
    ) && rotated < head_dim
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
        "lfm2" => {
            // Heads of keys are listed for each layer: none where it does not attend.
            let heads: Vec<usize> = gguf.require("lfm2.attention.head_count_kv")?;
            let kind = |&heads: &usize| if heads > 0 { "full_attention" } else { "conv" };
            config.insert("layer_types".into(), heads.iter().map(kind).collect());
            config.insert("num_key_value_heads".into(), json!(heads.iter().max()));
            config.insert("block_auto_adjust_ff_dim".into(), json!(false));
            if let Some(epsilon) = config.remove("rms_norm_eps") {
                config.insert("norm_eps".into(), epsilon);
            }
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
