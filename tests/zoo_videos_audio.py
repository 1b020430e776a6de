"""Audio pipelines: AudioLDM 2 and Stable Audio."""

from __future__ import annotations

import functools

import diffusers
import transformers
from diffusers.pipelines.audioldm2 import AudioLDM2ProjectionModel, AudioLDM2UNet2DConditionModel
from diffusers.pipelines.stable_audio import StableAudioProjectionModel

from pipelines import WORDS, ddim
from zoo import both, seeded, t5, vae, words, zoo

AUDIO = {"result": "audios", "copies": "num_waveforms_per_prompt", "callbacks": False}


def t5_words():
    """A genuine T5 tokenizer, for the pipelines that ask for the class."""
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0), ("\u2581", -5.0)]
    vocab += [("\u2581" + word, -1.0) for word in WORDS]
    return transformers.T5Tokenizer(vocab=vocab, extra_ids=0, model_max_length=16)


def roberta_words():
    pieces = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", *sorted(set("".join(WORDS))), "\u0120"]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    return transformers.RobertaTokenizer(vocab=vocab, merges=[], model_max_length=16)


def clap():
    text = transformers.ClapTextConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        projection_dim=16,
        max_position_embeddings=64,
    )
    audio = transformers.ClapAudioConfig(
        spec_size=64,
        num_mel_bins=64,
        window_size=4,
        depths=[1, 1],
        num_attention_heads=[1, 1],
        num_hidden_layers=2,
        patch_embeds_hidden_size=16,
        hidden_size=32,
        projection_dim=16,
        patch_size=2,
        patch_stride=2,
    )
    config = {"text_config": text.to_dict(), "audio_config": audio.to_dict(), "projection_dim": 16}
    return seeded(lambda: transformers.ClapModel(transformers.ClapConfig(**config)))


def gpt2():
    config = transformers.GPT2Config(
        n_embd=16,
        n_head=2,
        n_layer=1,
        vocab_size=20,
        n_positions=99,
        bos_token_id=3,
        eos_token_id=1,
    )
    model = seeded(lambda: transformers.GPT2LMHeadModel(config))
    model.config.max_new_tokens = 8
    return model


def vocoder():
    config = transformers.SpeechT5HifiGanConfig(
        model_in_dim=16,
        sampling_rate=16000,
        upsample_initial_channel=16,
        upsample_rates=[2, 2],
        upsample_kernel_sizes=[4, 4],
        resblock_kernel_sizes=[3, 7],
        resblock_dilation_sizes=[[1, 3], [1, 3]],
        normalize_before=False,
    )
    return seeded(lambda: transformers.SpeechT5HifiGan(config))


@zoo("AudioLDM2Pipeline", denoiser="unet", other={"audio_length_in_s": 0.016}, **AUDIO)
def audioldm2():
    net = functools.partial(
        AudioLDM2UNet2DConditionModel,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        sample_size=32,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=((None, 16, 24),) * 2,
        attention_head_dim=4,
    )
    project = functools.partial(
        AudioLDM2ProjectionModel,
        text_encoder_dim=16,
        text_encoder_1_dim=24,
        langauge_model_dim=16,
    )
    pipe = diffusers.AudioLDM2Pipeline(
        vae=vae(),
        text_encoder=clap(),
        text_encoder_2=t5(width=24),
        projection_model=seeded(project),
        language_model=gpt2(),
        tokenizer=roberta_words(),
        tokenizer_2=t5_words(),
        feature_extractor=transformers.ClapFeatureExtractor(hop_length=7900),
        unet=seeded(net, gain=20.0),
        scheduler=ddim(),
        vocoder=vocoder(),
    )
    return pipe, both(audio_length_in_s=0.008)


def oobleck():
    make = functools.partial(
        diffusers.AutoencoderOobleck,
        encoder_hidden_size=6,
        downsampling_ratios=[1, 2],
        decoder_channels=3,
        decoder_input_channels=4,
        channel_multiples=[2, 4],
        sampling_rate=4,
    )
    return seeded(make)


@zoo("StableAudioPipeline", denoiser="transformer", **AUDIO)
def stable_audio():
    net = functools.partial(
        diffusers.StableAudioDiTModel,
        sample_size=8,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        num_key_value_attention_heads=2,
        out_channels=4,
        cross_attention_dim=16,
        time_proj_dim=8,
        global_states_input_dim=32,
        cross_attention_input_dim=16,
    )
    project = functools.partial(
        StableAudioProjectionModel,
        text_encoder_dim=16,
        conditioning_dim=16,
        min_value=0,
        max_value=32,
    )
    options = {"prediction_type": "v_prediction", "sigma_schedule": "exponential"}
    pipe = diffusers.StableAudioPipeline(
        vae=oobleck(),
        text_encoder=t5(),
        projection_model=seeded(project),
        tokenizer=words(),
        transformer=seeded(net, gain=8.0),
        scheduler=diffusers.EDMDPMSolverMultistepScheduler(**options, sigma_data=1.0),
    )
    return pipe, both()


@zoo("StableAudioPipeline", denoiser="transformer", **AUDIO)
def stable_audio_no_negative():
    pipe, given = stable_audio()
    return pipe, {name: value for name, value in given.items() if name != "negative_prompt"}
