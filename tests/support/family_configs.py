"""Configs of any model of `transformers`, made tiny: what a field is, its name says."""

import dataclasses
import re

from family_sizes import HEAD_DIM, HEADS, LAYERS, OF_CLASSES, H, V

SPECIAL = range(50, V)  # ids that mean something; those of text are below
KEPT = re.compile(r"id2label|label2id|chunk_size_feed_forward|(num|in|out|audio|input)_channels|num_filters_in")
SPECIAL_ID = re.compile(r".*token_(id|index)|.*(start|end|bos|eos|patch|newline)_id|.*_indicator_token_ids")

# The value of the first whose pattern matches the whole name. Each element of a sequence gets it.
BY_NAME = [
    (r".*drop.*|.*jitter.*|mask_(time|feature)_prob", 0.0),
    (r"apply_spec_augment|use_cache|use_kernels?|use_mamba_kernels", False),
    # what stands between head and loss, or beside the loss: values that matter
    (r"final_logit_softcapping|logits_soft_cap|output_logit_soft_cap", 5.0),
    (r"logits_scaling", 3.0),
    (r"logit_scale|lm_head_multiplier|output_multiplier", 0.3),
    (r".*(aux_loss|z_loss|router_aux_loss|aux_loss_alpha)_?(coef|coefficient|weight)?", 0.5),
    (r"output_router_logits|lm_head_bias", True),
    (r"unpadded_vocab_size", V - 9),
    # tokens
    (r"(t2u_)?pad_token_id|pad_index", 0),
    (r"(t2u_)?bos_token_id|bos_index", 1),
    (r"(forced_)?eos_token_id|(t2u_)?decoder_start_token_id|eos_index", 2),
    (r"((text|output|input|src|tgt|decoder|t2u|audio)_)?vocab_size|vocab_size_per_layer_input", V),
    (r"(max_position|num_position)_embeddings|n_positions|n_ctx|max_(source|target)_positions", 64),
    # layers
    (r"depths", 1),
    (r"(num_|n_)?(encoder_|decoder_)?(hidden_)?(layers?|blocks)|num_(encoder|decoder)(_hidden)?_layers", LAYERS),
    (r"depth|.*_num_(hidden_)?layers|(t2u|speech)_(en|de)coder_layers", LAYERS),
    (r"num_mtp_layers|num_nextn_predict_layers|num_adapter_layers|max_window_layers|num_dense_layers", 1),
    (r"first_k_dense_replace|(de|en)coder_sparse_step", 1),
    # heads
    (r"(num_|n_)?(.*_)?(attention_)?heads?|.*_num_(attention_|key_value_|kv_)?heads|num_kv_heads|kv_n_heads", HEADS),
    (r".*head_dim|d_kv|dim_head|d_head|kv_channels|attention_head_size|query_pre_attn_scalar|rotary_dim", HEAD_DIM),
    (r"sliding_window(_size)?|(local_)?attention(_window)?(_size)?|.*chunk_size", 8),
    # widths
    (r"hidden_sizes?|(.*_)?(hidden|embedding)_(size|dim)|d_model|n_embd|emb(ed)?_dim|hidden_dim|d_inner|conv_dim", H),
    (r".*(intermediate_size|ffn_dim|ffn_(hidden_)?size|mlp_dim|d_ff|dff|dim_ff|feed_forward_size)(_mlp)?", H),
    (r".*(projection|output|out|in|input|embed|latent|codebook|condition|prompt|expert)_(dim|size)|.*_embed_dim", H),
    (r".*_channels|num_filters|num_patches|num_embeddings|ngram_vocab_size_base|upsample_groups|embedding_dim", H),
    (r"vector_quantization_hidden_dimension", H),
    (r"(kv|q|o)_lora_rank|state_size|mamba_d_state|ssm_state_size", 8),
    (r"n_groups|o_groups|hc_lowrank", 1),
    # experts
    (r"num_experts|n_routed_experts|num_local_experts|moe_num_experts|num_routed_experts", 4),
    (r"num_experts_per_tok|moe_topk|moe_top_k|top_k_experts|moe_k", 2),
    (r"(n|num|moe_num)_shared_experts|n_group|topk_group", 1),
    (r"index_topk|index_kpool|mamba_d_conv", 4),
    # images and sounds
    (r"image_size", 32),
    (r"patch_size", 8),
    (r"num_mel_bins|num_conv_pos_embeddings", 16),
    (r"num_conv_pos_embedding_groups|num_codebooks|num_quantizers", 4),
]  # fmt: skip
BY_NAME = [(re.compile(pattern), value) for pattern, value in BY_NAME]
LISTS = re.compile(r".*(indexes|indices|idxs)")  # of layers


def tiny(kind, **given):
    """A tiny config of this class; `given` overrules, a dict for a config within it."""
    sizes = {field.name: small(field.name, default(field)) for field in dataclasses.fields(kind)}
    sizes = {name: value for name, value in sizes.items() if value is not None}
    given = OF_CLASSES.get(kind.__name__, {}) | given
    for name, spec in kind.sub_configs_defaults.items():
        usual = {key: value for key, value in spec.init_kwargs.items() if small(key, value) is None}
        inner = usual | given.pop(name, {})
        sizes[name] = tiny(class_of(spec, inner.pop("model_type", None)), **inner)
    return kind(**sizes | given)


def default(field):
    if field.default is not dataclasses.MISSING:
        return field.default
    return None if field.default_factory is dataclasses.MISSING else field.default_factory()


def class_of(spec, model_type):
    from transformers import CONFIG_MAPPING, AutoConfig

    if model_type or spec.config_class is AutoConfig:
        return CONFIG_MAPPING[model_type or spec.model_type]
    return spec.config_class


def small(name, old):
    """The value of a field with this default, None where the default stays."""
    if KEPT.fullmatch(name):
        return None
    if LISTS.fullmatch(name) and isinstance(old, list | tuple):
        return type(old)([0])
    for pattern, value in BY_NAME:
        if pattern.fullmatch(name):
            return as_default(value, old)
    if type(old) is int and SPECIAL_ID.fullmatch(name):
        return special_id(name)
    return None


def as_default(value, old):
    """The value in the type of a default, or None, which leaves the default, where it has none in it."""
    if isinstance(value, bool) or isinstance(old, bool):
        return value if type(value) is type(old) else None
    if old is None:
        return value if isinstance(value, float) and value else None  # a softcap or a scale that is not there
    if isinstance(old, list | tuple):
        return type(old)([value] * len(old)) if old and all(type(n) is int for n in old) else None
    return type(old)(value) if isinstance(old, int | float) else None


def special_id(name):
    """An id for each name: that of an outer config and of those within it are the same."""
    name = re.sub(r"_(token_)?(id|index)$", "", name)
    return SPECIAL[sum(map(ord, name)) % len(SPECIAL)]
