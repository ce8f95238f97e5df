"""Small pipelines with random weights, made without a hub: name -> what saves it into a folder."""

import diffusers
import torch
import transformers
from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
from tokenizers.pre_tokenizers import ByteLevel

LETTERS = sorted(ByteLevel.alphabet())


def clip_tokenizer():
    tokens = [*LETTERS, *(letter + "</w>" for letter in LETTERS), "<|startoftext|>", "<|endoftext|>"]
    return transformers.CLIPTokenizer(
        vocab={token: index for index, token in enumerate(tokens)}, merges=[], model_max_length=77
    )


def clip(model=transformers.CLIPTextModel):
    size = 2 * len(LETTERS) + 2
    config = transformers.CLIPTextConfig(
        vocab_size=size,
        hidden_size=32,
        intermediate_size=64,
        projection_dim=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        bos_token_id=size - 2,
        eos_token_id=size - 1,
        pad_token_id=size - 1,
    )
    return model(config)


def t5_tokenizer():
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    vocabulary += [(letter, -4.0) for letter in "abcdefghijklmnopqrstuvwxyz0123456789,."]
    vocabulary += [(f"<extra_id_{number}>", 0.0) for number in reversed(range(10))]
    return transformers.T5Tokenizer(vocab=vocabulary, extra_ids=10, model_max_length=512)


T5_SIZES = {"vocab_size": 64, "d_model": 64, "d_ff": 128, "d_kv": 32, "num_layers": 2, "num_heads": 2}


def t5():
    return transformers.T5EncoderModel(transformers.T5Config(**T5_SIZES, feed_forward_proj="gated-gelu"))


def image_vae(latent_channels=4):
    return diffusers.AutoencoderKL(
        block_out_channels=[32, 32],
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        latent_channels=latent_channels,
        norm_num_groups=8,
        sample_size=16,
        shift_factor=0.0,
    )


def stable_diffusion():
    """A UNet, a CLIP text encoder and a safety checker."""
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=8,
        norm_num_groups=8,
    )
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**vision, "vocab_size": 16}
    sizes = {"image_size": 32, "patch_size": 16, **vision}
    return diffusers.StableDiffusionPipeline(
        unet=unet,
        vae=image_vae(),
        text_encoder=clip(),
        tokenizer=clip_tokenizer(),
        scheduler=diffusers.DDIMScheduler(clip_sample=False, steps_offset=1),
        safety_checker=StableDiffusionSafetyChecker(
            transformers.CLIPConfig(text_config=text, vision_config=sizes, projection_dim=32)
        ),
        feature_extractor=transformers.CLIPImageProcessor(
            size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
        ),
    )


def stable_diffusion_3():
    """Two CLIP text encoders and a T5 beside a transformer."""
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=32,
        num_attention_heads=2,
        joint_attention_dim=64,
        caption_projection_dim=64,
        pooled_projection_dim=64,
        pos_embed_max_size=16,
    )
    return diffusers.StableDiffusion3Pipeline(
        transformer=transformer,
        vae=image_vae(),
        text_encoder=clip(transformers.CLIPTextModelWithProjection),
        text_encoder_2=clip(transformers.CLIPTextModelWithProjection),
        text_encoder_3=t5(),
        tokenizer=clip_tokenizer(),
        tokenizer_2=clip_tokenizer(),
        tokenizer_3=t5_tokenizer(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
    )


def wan():
    """Video: a transformer that keeps some modules in float32, and a VAE of convolutions alone."""
    transformer = diffusers.WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=32,
        in_channels=16,
        out_channels=16,
        text_dim=64,
        freq_dim=32,
        ffn_dim=128,
        num_layers=2,
        rope_max_seq_len=32,
    )
    return diffusers.WanPipeline(
        transformer=transformer,
        vae=diffusers.AutoencoderKLWan(base_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1),
        text_encoder=transformers.UMT5EncoderModel(
            transformers.UMT5Config(**T5_SIZES, feed_forward_proj="gated-gelu")
        ),
        tokenizer=t5_tokenizer(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
    )


def z_image():
    """A language model as text encoder, and a feed-forward of 682, which few block sizes divide."""
    chat = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    words = [*LETTERS, "<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = transformers.Qwen2Tokenizer(vocab={word: index for index, word in enumerate(words)}, merges=[])
    tokenizer.chat_template = chat
    transformer = diffusers.ZImageTransformer2DModel(
        in_channels=16,
        dim=256,
        n_layers=1,
        n_refiner_layers=1,
        n_heads=4,
        n_kv_heads=4,
        cap_feat_dim=64,
        axes_dims=[16, 24, 24],
        axes_lens=[256, 64, 64],
    )
    for parameter in (transformer.x_pad_token, transformer.cap_pad_token):  # the class leaves them as memory was
        torch.nn.init.normal_(parameter, std=0.02)
    encoder = transformers.Qwen3Config(
        vocab_size=len(words) + 4,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=1024,
    )
    return diffusers.ZImagePipeline(
        transformer=transformer,
        vae=image_vae(16),
        text_encoder=transformers.Qwen3Model(encoder),
        tokenizer=tokenizer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
    )


def pixart():
    """Its pipeline reports steps by its progress bar alone."""
    transformer = diffusers.PixArtTransformer2DModel(
        sample_size=8,
        num_layers=1,
        patch_size=2,
        attention_head_dim=16,
        num_attention_heads=2,
        caption_channels=64,
        cross_attention_dim=32,
        in_channels=4,
        out_channels=8,
        use_additional_conditions=False,
    )
    return diffusers.PixArtSigmaPipeline(
        transformer=transformer,
        vae=image_vae(),
        text_encoder=t5(),
        tokenizer=t5_tokenizer(),
        scheduler=diffusers.DPMSolverMultistepScheduler(),
    )


BUILDERS = {"pixart": pixart, "sd": stable_diffusion, "sd3": stable_diffusion_3, "wan": wan, "zimage": z_image}


def save(name, folder):
    """Make the pipeline of that name, of these or of a further family, in bfloat16, always with the same weights."""
    builders = BUILDERS
    if name not in BUILDERS:
        from . import family_pipelines, older_pipelines  # many classes, so imported where they are needed

        builders = family_pipelines.BUILDERS | older_pipelines.BUILDERS
    torch.manual_seed(0)
    builders[name]().to(torch.bfloat16).save_pretrained(folder)
