"""What a model of `transformers` is called with: ids, labels, and what its kind sees or hears."""

import inspect
import re

import torch

B, S, TEXT = 2, 11, (5, 45)  # rows, tokens, ids of text: no config gives these a meaning


# What an argument is made of: a shape of random numbers, or a function of the config, of the arguments so far, and of
# a generator.


def ids_of(*shape, most=TEXT[1]):
    return lambda config, given, random: torch.randint(TEXT[0], most, shape, generator=random)


def ones(*shape, dtype=torch.int64):
    return lambda config, given, random: torch.ones(shape, dtype=dtype)


def boxes(config, given, random):
    return torch.rand(B, S, 4, generator=random)


def only_text(config, given, random):
    return torch.zeros(B, S, dtype=torch.int64)


def first_positions(count):
    return lambda config, given, random: (torch.arange(S) < count).expand(B, S)


def image_prefix(count):
    """As many tokens of images, or of videos, before each text as an image gives."""

    def prefixed(config, given, random):
        given["input_ids"][:, :count] = getattr(config, "image_token_index", None) or config.video_token_index
        given["labels"][:, :count] = -100
        return given["input_ids"]

    return prefixed


def sound_prefix(count):
    """As many tokens of sounds before each text; where sounds are latents, the first says so."""

    def prefixed(config, given, random):
        given["input_ids"][:, :count] = getattr(config, "audio_token_id", None) or config.audio_latent_token_id
        if hasattr(config, "audio_latent_token_id"):
            given["input_ids"][:, 0] = config.audio_bos_token_id
        return given["input_ids"]

    return prefixed


IMAGE, VIDEO, WAVES = {"pixel_values": (B, 3, 32, 32)}, {"pixel_values": (B, 1, 3, 32, 32)}, {"input_values": (B, 4000)}
QUERIES = {"qformer_input_ids": ids_of(B, 4), "input_ids": image_prefix(2)}
EMBEDDED, NO_IDS = {"input_ids": None, "inputs_embeds": (B, S, 32)}, {"input_ids": None}
FOUR_IDS = {"input_ids": ids_of(B, 4), "labels": ids_of(B, 4)}
FOUR_CODEBOOKS = {"labels": ids_of(B, S, 4)}

# By class name, the first that matches.
INPUTS = [
    (r"BlipForQuestionAnswering", IMAGE | {"labels": ids_of(B, S)}),
    (r"BlipForCond.*|Git.*", IMAGE),
    (r"Blip2For.*", IMAGE | {"input_ids": image_prefix(2)}),
    (r"InstructBlipFor.*", IMAGE | QUERIES),
    (r"InstructBlipVideoFor.*", VIDEO | QUERIES),
    (r"VisionEncoderDecoder.*", IMAGE | NO_IDS),
    (r"PPFormulaNet.*", IMAGE | NO_IDS | {"decoder_input_ids": ids_of(B, S)}),
    (r"Kosmos2For.*", IMAGE | {"image_embeds_position_mask": first_positions(2)}),
    (r"IdeficsForVision.*", VIDEO | {"image_attention_mask": ids_of(B, S, 1, most=6)}),
    (r"Pix2Struct.*", NO_IDS | {"flattened_patches": (B, 4, 34)}),
    (r"Udop.*", {"bbox": boxes}),
    (r"Molmo2.*", {"mm_token_type_ids": only_text}),
    (r"Whisper.*Generation", {"input_features": (B, 16, 128)}),
    (r"SeamlessM4T(v2)?ForSpeech.*", {"input_features": (B, 32, 32)}),
    (r"Speech2Text.*", {"input_features": (B, 32, 80)}),
    (r"VoxtralRealtime.*", {"input_features": (B, 16, 88)}),
    (r"Canary.*|CohereAsr.*", NO_IDS | {"input_features": (B, 64, 16)}),
    (r"Moonshine.*", WAVES),
    (r"SpeechT5.*|SpeechEncoderDecoder.*", WAVES | NO_IDS),
    (r"SeamlessM4TTextToUnit.*", EMBEDDED),
    (r"SeamlessM4Tv2TextToUnit.*", EMBEDDED | {"char_input_ids": ids_of(B, S), "char_count_per_id": ones(B, S)}),
    (r"Qwen3OmniMoeTalkerFor.*", EMBEDDED | {"talker_input_ids": ids_of(B, S)}),
    (r".*CodePredictor.*", NO_IDS | {"inputs_embeds": (B, 4, 32), "labels": ids_of(B, 4)}),
    (r"DiaFor.*", {"decoder_input_ids": ids_of(B, S, 9), "labels": ids_of(B * 9, S)}),
    (r"CsmDepth.*", FOUR_IDS | {"backbone_last_hidden_state": (B, 32)}),
    (r"MoshiDepth.*", FOUR_IDS | {"last_hidden_state": (B, 4, 32)}),
    (r"CsmFor.*|Musicgen(Melody)?ForCond.*", FOUR_CODEBOOKS),
    (r"Musicgen(Melody)?ForCausal.*", {"input_ids": ids_of(B * 4, S)} | FOUR_CODEBOOKS),
    (r"KyutaiSpeech.*", {"input_ids": ids_of(B, S, 5)}),
    (r"GradiumPhonon.*|PocketTTS.*", {"input_ids": sound_prefix(5), "labels": (B, 4, 32)}),
    (
        r"HiggsAudioV2.*",
        {
            "input_ids": sound_prefix(4),
            "audio_input_ids": ids_of(B, 4, 4, most=30),
            "audio_labels": ids_of(B, 4, 4, most=30),
            "audio_input_ids_mask": ones(B, 4, dtype=torch.bool),
        },
    ),
    (
        r"Rag.*",
        NO_IDS
        | {
            "context_input_ids": ids_of(2 * B, S),
            "context_attention_mask": ones(2 * B, S),
            "doc_scores": (B, 2),
            "labels": ids_of(B, S),
        },
    ),
    (r".*", {}),
]


def batch(model):
    """Keyword arguments of the model's forward, labels among them."""
    random = torch.Generator().manual_seed(0)
    takes = inspect.signature(model.forward).parameters
    ids = torch.randint(*TEXT, (B, S), generator=random)
    labels = ids.clone()
    labels[0, :3] = -100
    labels[1, 4] = -100
    arguments = {"labels": labels}
    given = next(inputs for pattern, inputs in INPUTS if re.fullmatch(pattern, type(model).__name__))
    if "input_ids" in takes and model.main_input_name in {"input_ids", "pixel_values"}:
        arguments["input_ids"] = ids
        if "attention_mask" in takes and "input_ids" not in given:
            arguments["attention_mask"] = torch.ones_like(ids)
            arguments["attention_mask"][1, -2:] = 0  # though labels are there: some losses are masked by it
    for name, value in given.items():
        if value is None:
            arguments.pop(name, None)
        elif isinstance(value, tuple):
            arguments[name] = torch.randn(value, generator=random)
        else:
            arguments[name] = value(model.config, arguments, random)
    return arguments
