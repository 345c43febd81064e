"""What tiny configs need beside what their fields' names say: by config class."""

V, H, HEADS, HEAD_DIM, LAYERS = 99, 32, 2, 16, 2


def rope(*mrope_section, **more):
    return {
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": list(mrope_section), **more}
    }


def bart():
    parts = {f"{part}_{what}": n for part in ("encoder", "decoder") for what, n in (("layers", 1), ("ffn_dim", H))}
    return {"model_type": "bart", "d_model": H, "vocab_size": V, **parts}


def transformer():
    return {"hidden_size": H, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": V}


IMAGE_TOKEN, VIDEO_TOKEN = 75, 95  # what family_configs.special_id gives
IMAGE_WORDS = {**{f"IMGIMG{chr(65 + i)}Z": 60 + i for i in range(5)}, "<image>": IMAGE_TOKEN}
VISUAL_WORDS = {**{f"<|visual token {i:06d}|>": 60 + i for i in range(8)}, "<|extra_200|>": 70, "<image>": IMAGE_TOKEN}
HEAD = {"head_dim": HEAD_DIM}  # None by default, and nothing is made of it
HYBRID = {"num_hidden_layers": 3, "layers_block_type": ["mamba", "hybrid", "hybrid"]}
ONE_SPARSE = {"mlp_layer_types": ["dense", "sparse"]}
SHORT_SOUNDS = {"upsampling_ratios": [2, 2], "num_filters": 8}
SHORT_LATENTS = {"downsampling_ratios": [2, 2], "depths": [1, 1, 1], "num_filters": 4}
QUERIES = {"num_query_tokens": 2}

OF_CLASSES = {
    # positions of several axes
    "CohereCompassTextConfig": {"rope_parameters": {"full_attention": rope(2, 3, 3)["rope_parameters"]}},
    "Cosmos3EdgeTextConfig": rope(2, 3, 3),
    "Ernie4_5_VLMoeTextConfig": rope(3, 3, 2) | {"moe_intermediate_size": [H, H]},
    "Glm4vMoeTextConfig": rope(1, 1, 2, partial_rotary_factor=0.5),
    "Glm4vTextConfig": rope(2, 3, 3),
    "GlmImageTextConfig": rope(2, 3, 3) | {"vision_vocab_size": V},
    "GlmOcrTextConfig": rope(2, 3, 3),
    "HYV4VLTextConfig": rope(2, 3, 3),
    "HunYuanVLTextConfig": rope(2, 2, 2, 2) | HEAD,
    "PaddleOCRTextConfig": rope(2, 3, 3),
    "Qwen2VLTextConfig": rope(2, 3, 3),
    "Qwen2_5OmniTextConfig": rope(2, 3, 3),
    "Qwen2_5_VLTextConfig": rope(2, 3, 3),
    # heads, layers and experts
    "CodeGenConfig": {"rotary_dim": 8},
    "DbrxConfig": {
        "attn_config": {"clip_qkv": 8.0, "kv_n_heads": 2, "rope_theta": 1e4},
        "ffn_config": {
            "hidden_size": H,
            "ffn_hidden_size": H,
            "moe_num_experts": 4,
            "moe_top_k": 2,
            "moe_loss_weight": 0.5,
        },
    },
    "DeepseekOcr2TextConfig": {"num_experts_per_tok": 2} | ONE_SPARSE,
    "DeepseekV2Config": {"num_experts_per_tok": 2},
    "DeepseekV4Config": {"mlp_layer_types": ["moe", "moe"]},
    "Dots1Config": {"num_experts_per_tok": 2, "n_routed_experts": 4, "n_shared_experts": 1},
    "Dots3NoteVisionConfig": {"mlp_layer_types": ["dense", "dense"], "pyramid_num_routed": None},
    "Ernie4_5_MoeConfig": {"moe_layer_start_index": 0, "moe_layer_end_index": 1},
    "FlintConfig": {"mlp_only_layers": [], "layer_types": ["sliding_attention", "full_attention"]},
    "GPTNeoConfig": {"attention_types": [[["global", "local"], 1]], "window_size": 8},
    "Gemma3nTextConfig": {
        "num_kv_shared_layers": 0,
        "layer_types": ["full_attention"] * 2,
        "intermediate_size": [H, H],
        "laurel_rank": 4,
        "activation_sparsity_pattern": [0.0, 0.0],
        "hidden_size_per_layer_input": 8,
    },
    "Glm5NextTextConfig": {"qk_rope_head_dim": 0} | ONE_SPARSE,
    "HunYuanDenseV1Config": HEAD,
    "HunYuanMoEV1Config": HEAD,
    "Lfm2MoeConfig": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "Mamba2Config": {"num_heads": 4},
    "MiMoV2FlashConfig": {"num_key_value_heads": 1},
    "MinistralConfig": HEAD,
    "NemotronConfig": HEAD | {"num_key_value_heads": 2},
    "NemotronHConfig": {"layers_block_type": ["mamba", "full_attention", "moe"]},
    "Qwen3OmniMoeTalkerTextConfig": {"shared_expert_intermediate_size": H},
    "ReformerConfig": {
        "is_decoder": True,
        "axial_pos_embds": False,
        "attn_layers": ["local", "local"],
        "chunk_size_lm_head": 0,
    },
    "Step3p7TextConfig": {"sliding_window": 8, "num_sliding_attention_heads": 2},
    "XmodConfig": {"default_language": "en_XX"},
    "Zamba2Config": HYBRID | {"intermediate_size": H},
    "ZambaConfig": HYBRID,
    "ZayaConfig": {"num_experts_per_tok": 1},
    # bytes, images and sounds
    "Apertus1p5Config": {"image_token_offset": 35, "audio_token_offset": 67},
    "Blip2Config": QUERIES | {"image_token_index": IMAGE_TOKEN},
    "Blip2QFormerConfig": {"cross_attention_frequency": 1},
    "BltConfig": {"encoder_hash_byte_group_vocab": 50},
    "BltGlobalTransformerConfig": {"hidden_size": 2 * H},
    "BltLocalDecoderConfig": {"hidden_size_global": 2 * H},
    "BltLocalEncoderConfig": {"hidden_size_global": 2 * H, "encoder_hash_byte_group_vocab": 50},
    "ChameleonConfig": {"vocabulary_map": IMAGE_WORDS},
    "CohereAsrConfig": {"decoder_start_token_id": 2},
    "Emu3Config": {"vocabulary_map": VISUAL_WORDS},
    "EncodecConfig": SHORT_SOUNDS,
    "EvollaConfig": {"protein_encoder_config": transformer() | {"intermediate_size": H}},
    "FastVlmConfig": {"vision_config": {"model_type": "siglip_vision_model"}},
    "FunAsrNanoAdaptorConfig": {"intermediate_size": H // 4},
    "Granite4VisionConfig": {
        "text_config": {"hidden_size": 2 * H},
        "vision_config": {"hidden_size": 2 * H},
        "deepstack_layer_map": [[-1, 0]],
        "spatial_target_layers": [1],
        "downsample_rate": "1/2",
    },
    "InstructBlipConfig": QUERIES | {"image_token_index": IMAGE_TOKEN},
    "InstructBlipVideoConfig": QUERIES | {"video_token_index": VIDEO_TOKEN},
    "Kosmos2Config": {"latent_query_num": 2},
    "MimiConfig": SHORT_SOUNDS,
    "Molmo2AdapterConfig": {"vision_feature_layer": [-1]},
    "MoonshineConfig": {"pad_token_id": 0},
    "MoonshineStreamingConfig": {"decoder_start_token_id": 2, "num_key_value_heads": 2},
    "MoonshineStreamingEncoderConfig": {"sliding_windows": [[8, 4], [8, 4]]},
    "MoshiDepthConfig": {"input_size": H},
    "MuseSparkAudioConfig": {"patch_sizes": (16, 6), "hidden_sizes": (H, H), "depths": (1, 1)},
    "MusicgenDecoderConfig": {"decoder_start_token_id": 2},
    "ParakeetEncoderConfig": {"projection_hidden_size": H, "projection_bias": False},
    "Qwen2_5OmniThinkerConfig": {"vision_start_token_id": 93},
    "Qwen3OmniMoeThinkerConfig": {"vision_start_token_id": 93},
    "Qwen3OmniMoeTalkerConfig": {"spatial_merge_size": 2, "vocab_size": V},
    "RagConfig": {"n_docs": 2, "reduce_loss": True, "question_encoder": transformer(), "generator": bart()},
    "VibeVoiceAcousticTokenizerConfig": SHORT_LATENTS,
    "VibeVoiceAcousticTokenizerEncoderConfig": SHORT_LATENTS,
    "VibeVoiceAsrConfig": {"acoustic_tokenizer_chunk_size": 3200},
}

UNINITIALISED = {  # parameters that transformers leaves as torch.empty gives them: a part of their names, by class
    "Qwen3OmniMoeTalkerForConditionalGeneration": ".mlp.experts.",
}
