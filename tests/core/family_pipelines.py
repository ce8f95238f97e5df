"""Small pipelines of further families, with random weights: name -> what makes one."""

import diffusers
import torch
import transformers
from diffusers.pipelines.ace_step import AceStepAudioTokenDetokenizer, AceStepAudioTokenizer, AceStepConditionEncoder
from diffusers.pipelines.deprecated.wuerstchen import PaellaVQModel
from diffusers.pipelines.stable_cascade import StableCascadeDecoderPipeline

from .tiny_pipelines import LETTERS, T5_SIZES, clip, clip_tokenizer, stable_diffusion, t5_tokenizer

_WORDS = [*LETTERS, "<|endoftext|>", "<|im_start|>", "<|im_end|>"]
_CHAT = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
_TEXT = {
    "vocab_size": len(_WORDS) + 1,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "rope_scaling": {"mrope_section": [4, 6, 6], "rope_type": "default", "type": "default"},
}


def qwen_tokenizer():
    tokenizer = transformers.Qwen2Tokenizer(vocab={word: index for index, word in enumerate(_WORDS)}, merges=[])
    tokenizer.chat_template = _CHAT
    return tokenizer


def byt5():
    """A T5 that reads bytes."""
    sizes = T5_SIZES | {"vocab_size": 384}
    return transformers.T5EncoderModel(transformers.T5Config(**sizes, feed_forward_proj="gated-gelu"))


def hunyuan_image():
    """Two guiders, a text encoder of bytes, and a language model that sees."""
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 64}
    encoder = transformers.Qwen2_5_VLConfig(text_config=_TEXT, vision_config=vision)
    return diffusers.HunyuanImagePipeline(
        transformer=diffusers.HunyuanImageTransformer2DModel(
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=32,
            num_layers=1,
            num_single_layers=1,
            num_refiner_layers=1,
            patch_size=(1, 1),
            text_embed_dim=64,
            text_embed_2_dim=64,
            rope_axes_dim=(16, 16),
        ),
        vae=diffusers.AutoencoderKLHunyuanImage(
            in_channels=3,
            out_channels=3,
            latent_channels=4,
            block_out_channels=(32, 64, 64, 64),
            layers_per_block=1,
            scaling_factor=0.5,
            spatial_compression_ratio=8,
            sample_size=64,
        ),
        text_encoder=transformers.Qwen2_5_VLForConditionalGeneration(encoder),
        tokenizer=qwen_tokenizer(),
        text_encoder_2=byt5(),
        tokenizer_2=transformers.ByT5Tokenizer(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=5.0),
        guider=diffusers.AdaptiveProjectedMixGuidance(adaptive_projected_guidance_start_step=1),
        ocr_guider=diffusers.AdaptiveProjectedMixGuidance(adaptive_projected_guidance_start_step=2),
    )


def hunyuan_video_15():
    """Video with a guider."""
    return diffusers.HunyuanVideo15Pipeline(
        transformer=diffusers.HunyuanVideo15Transformer3DModel(
            in_channels=9,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=32,
            num_layers=1,
            num_refiner_layers=1,
            mlp_ratio=2.0,
            patch_size=1,
            patch_size_t=1,
            text_embed_dim=64,
            text_embed_2_dim=64,
            image_embed_dim=32,
            rope_axes_dim=(8, 12, 12),
            target_size=16,
            task_type="t2v",
        ),
        vae=diffusers.AutoencoderKLHunyuanVideo15(
            in_channels=3,
            out_channels=3,
            latent_channels=4,
            block_out_channels=(16, 16),
            layers_per_block=1,
            spatial_compression_ratio=4,
            temporal_compression_ratio=2,
            downsample_match_channel=False,
            upsample_match_channel=False,
        ),
        text_encoder=transformers.Qwen2_5_VLTextModel(transformers.Qwen2_5_VLTextConfig(**_TEXT)),
        tokenizer=qwen_tokenizer(),
        text_encoder_2=byt5(),
        tokenizer_2=transformers.ByT5Tokenizer(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=5.0),
        guider=diffusers.ClassifierFreeGuidance(guidance_scale=2.0),
    )


def motif_video():
    """Video with another guider, and an encoder of the Gemma family."""
    text = transformers.T5Gemma2TextConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=128,
    )
    text.dropout_rate, text.layer_norm_epsilon, text.dense_act_fn = 0.0, 1e-6, "gelu"  # which the encoder asks for
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes = transformers.T5Gemma2EncoderConfig(
        text_config=text, vision_config={"image_size": 16, "patch_size": 8, **vision}, mm_tokens_per_image=4
    )
    return diffusers.MotifVideoPipeline(
        transformer=diffusers.MotifVideoTransformer3DModel(
            in_channels=33,
            out_channels=16,
            num_attention_heads=2,
            attention_head_dim=32,
            num_layers=1,
            num_single_layers=1,
            mlp_ratio=2.0,
            patch_size=1,
            patch_size_t=1,
            text_embed_dim=64,
            rope_axes_dim=(8, 12, 12),
        ),
        vae=diffusers.AutoencoderKLWan(base_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1),
        text_encoder=transformers.T5Gemma2Encoder(sizes),
        tokenizer=t5_tokenizer(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=5.0),
        guider=diffusers.AdaptiveProjectedGuidance(),
    )


def longcat_audio():
    """Sound; the class makes its scheduler itself, of which a folder has no files."""
    return diffusers.LongCatAudioDiTPipeline(
        transformer=diffusers.LongCatAudioDiTTransformer(
            dit_dim=64, dit_depth=2, dit_heads=2, dit_text_dim=64, latent_dim=8, text_conv=False
        ),
        vae=diffusers.LongCatAudioDiTVae(
            in_channels=1,
            channels=16,
            c_mults=[1, 2],
            strides=[2],
            latent_dim=8,
            encoder_latent_dim=16,
            downsampling_ratio=2,
            sample_rate=24000,
        ),
        text_encoder=transformers.UMT5EncoderModel(
            transformers.UMT5Config(**T5_SIZES, feed_forward_proj="gated-gelu")
        ),
        tokenizer=t5_tokenizer(),
    )


def controlnets():
    """Stable Diffusion with two ControlNets, which are saved in folders of their own."""
    base = stable_diffusion()
    parts = [diffusers.ControlNetModel.from_unet(base.unet, "rgb", (16, 32)) for _ in range(2)]  # halves, as the VAE
    for part in parts:
        for name, parameter in part.named_parameters():
            if "controlnet" in name:  # which begin as zeros, and would change nothing
                torch.nn.init.normal_(parameter, std=0.2)
    components = base.components | {"controlnet": parts, "safety_checker": None, "feature_extractor": None}
    return diffusers.StableDiffusionControlNetPipeline(**components, requires_safety_checker=False)


def stable_cascade():
    """A decoder and a VQ model, and a scheduler that has no length."""
    return StableCascadeDecoderPipeline(
        decoder=diffusers.StableCascadeUNet(
            conditioning_dim=32,
            block_out_channels=(32, 64),
            num_attention_heads=(-1, 2),
            down_num_layers_per_block=(1, 1),
            up_num_layers_per_block=(1, 1),
            down_blocks_repeat_mappers=(1, 1),
            up_blocks_repeat_mappers=(1, 1),
            block_types_per_layer=(
                ("SDCascadeResBlock", "SDCascadeTimestepBlock"),
                ("SDCascadeResBlock", "SDCascadeTimestepBlock", "SDCascadeAttnBlock"),
            ),
            switch_level=None,
            in_channels=4,
            out_channels=4,
            clip_text_pooled_in_channels=32,
            effnet_in_channels=4,
            dropout=(0.0, 0.0),
            kernel_size=3,
            patch_size=1,
        ),
        vqgan=PaellaVQModel(bottleneck_blocks=1, num_vq_embeddings=2, embed_dim=32),
        text_encoder=clip(transformers.CLIPTextModelWithProjection),
        tokenizer=clip_tokenizer(),
        scheduler=diffusers.DDPMWuerstchenScheduler(),
        latent_dim_scale=4.0,
    )


def ace_step():
    """Sound; two of its models are called tokenizers."""
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 32}
    encoder = {name: value for name, value in _TEXT.items() if name != "rope_scaling"}
    sizes = {"hidden_size": 64, "intermediate_size": 128, **heads}
    audio = {**sizes, "audio_acoustic_hidden_dim": 8, "pool_window_size": 2, "num_attention_pooler_hidden_layers": 1}
    return diffusers.AceStepPipeline(
        transformer=diffusers.AceStepTransformer1DModel(
            **sizes, num_hidden_layers=1, in_channels=24, audio_acoustic_hidden_dim=8, patch_size=2, sliding_window=16
        ),
        condition_encoder=AceStepConditionEncoder(
            **sizes,
            text_hidden_dim=64,
            timbre_hidden_dim=8,
            num_lyric_encoder_hidden_layers=1,
            num_timbre_encoder_hidden_layers=1,
            sliding_window=16,
        ),
        vae=diffusers.AutoencoderOobleck(
            encoder_hidden_size=6,
            downsampling_ratios=[1, 2],
            decoder_channels=3,
            decoder_input_channels=8,
            audio_channels=2,
            channel_multiples=[2, 4],
            sampling_rate=4,
        ),
        text_encoder=transformers.Qwen3Model(transformers.Qwen3Config(**encoder, head_dim=32)),
        tokenizer=qwen_tokenizer(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(num_train_timesteps=1, shift=1.0),
        audio_tokenizer=AceStepAudioTokenizer(**audio, fsq_dim=64),
        audio_token_detokenizer=AceStepAudioTokenDetokenizer(**audio),
    )


BUILDERS = {
    "acestep": ace_step,
    "cascade": stable_cascade,
    "controlnets": controlnets,
    "hunyuanimage": hunyuan_image,
    "hunyuanvideo15": hunyuan_video_15,
    "longcat": longcat_audio,
    "motif": motif_video,
}
