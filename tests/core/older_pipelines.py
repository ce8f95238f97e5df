"""Small pipelines of families that do something in a way of their own: name -> what makes it."""

import diffusers
import transformers

from .tiny_pipelines import LETTERS, clip, clip_tokenizer, image_vae, t5, t5_tokenizer


def unet(**settings):
    sizes = {"cross_attention_dim": 32, "attention_head_dim": 8} | settings
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
        **sizes,
    )


def stable_diffusion_xl():
    """In float16 its VAE decodes in float32."""
    return diffusers.StableDiffusionXLPipeline(
        unet=unet(
            cross_attention_dim=64,
            attention_head_dim=(2, 4),
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            transformer_layers_per_block=(1, 1),
            projection_class_embeddings_input_dim=6 * 8 + 32,
        ),
        vae=image_vae(),
        text_encoder=clip(),
        text_encoder_2=clip(transformers.CLIPTextModelWithProjection),
        tokenizer=clip_tokenizer(),
        tokenizer_2=clip_tokenizer(),
        scheduler=diffusers.EulerDiscreteScheduler(),
    )


def perturbed_attention():
    """Its UNet gets other attention processors for each run."""
    return diffusers.StableDiffusionPAGPipeline(
        unet=unet(),
        vae=image_vae(),
        text_encoder=clip(),
        tokenizer=clip_tokenizer(),
        scheduler=diffusers.DDIMScheduler(clip_sample=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
        pag_applied_layers="mid",
    )


def animate_diff():
    """Video, by modules that call their layers with the name of the input."""
    return diffusers.AnimateDiffPipeline(
        unet=unet(),
        vae=image_vae(),
        text_encoder=clip(),
        tokenizer=clip_tokenizer(),
        motion_adapter=diffusers.MotionAdapter(
            block_out_channels=(32, 64),
            motion_layers_per_block=1,
            motion_norm_num_groups=8,
            motion_num_attention_heads=2,
        ),
        scheduler=diffusers.DDIMScheduler(clip_sample=False, beta_schedule="linear", steps_offset=1),
    )


def latent_diffusion():
    """Its pictures are arrays; its VAE and its text encoder have names of their own."""
    return diffusers.LDMTextToImagePipeline(
        vqvae=diffusers.AutoencoderKL(
            block_out_channels=(32,) * 4,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            norm_num_groups=8,
        ),
        bert=clip(),
        tokenizer=clip_tokenizer(),
        unet=unet(),
        scheduler=diffusers.DDIMScheduler(clip_sample=False, steps_offset=1),
    )


def stable_cascade_prior():
    """Its scheduler raises when it is asked for its length, and it makes no picture but what a decoder takes."""
    return diffusers.StableCascadePriorPipeline(
        prior=diffusers.StableCascadeUNet(
            conditioning_dim=64,
            block_out_channels=(64, 64),
            num_attention_heads=(2, 2),
            down_num_layers_per_block=(1, 1),
            up_num_layers_per_block=(1, 1),
            switch_level=(False,),
            clip_image_in_channels=768,
            clip_text_in_channels=32,
            clip_text_pooled_in_channels=32,
            dropout=(0.1, 0.1),
        ),
        text_encoder=clip(transformers.CLIPTextModelWithProjection),
        tokenizer=clip_tokenizer(),
        scheduler=diffusers.DDPMWuerstchenScheduler(),
    )


def kandinsky_22():
    """Two stages; its UNet asks for the dtype of a layer's weight."""
    vision = transformers.CLIPVisionConfig(
        hidden_size=32,
        projection_dim=32,
        intermediate_size=64,
        num_attention_heads=2,
        num_hidden_layers=1,
        image_size=32,
        patch_size=16,
    )
    prior = diffusers.PriorTransformer(num_attention_heads=2, attention_head_dim=16, embedding_dim=32, num_layers=1)
    prior.clip_std.data.fill_(1)
    return diffusers.KandinskyV22CombinedPipeline(
        unet=diffusers.UNet2DConditionModel(
            in_channels=4,
            out_channels=8,
            addition_embed_type="image",
            down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
            up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
            mid_block_type="UNetMidBlock2DSimpleCrossAttn",
            block_out_channels=(32, 64),
            layers_per_block=1,
            encoder_hid_dim=32,
            encoder_hid_dim_type="image_proj",
            cross_attention_dim=32,
            attention_head_dim=8,
            resnet_time_scale_shift="scale_shift",
        ),
        scheduler=diffusers.DDIMScheduler(clip_sample=False, beta_schedule="linear", steps_offset=1),
        movq=diffusers.VQModel(
            block_out_channels=(32, 64),
            down_block_types=("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
            up_block_types=("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
            latent_channels=4,
            norm_num_groups=8,
            norm_type="spatial",
            num_vq_embeddings=12,
            vq_embed_dim=4,
        ),
        prior_prior=prior,
        prior_image_encoder=transformers.CLIPVisionModelWithProjection(vision),
        prior_text_encoder=clip(transformers.CLIPTextModelWithProjection),
        prior_tokenizer=clip_tokenizer(),
        prior_scheduler=diffusers.UnCLIPScheduler(
            variance_type="fixed_small_log", prediction_type="sample", clip_sample_range=10.0
        ),
        prior_image_processor=transformers.CLIPImageProcessor(size=32, crop_size=32),
    )


def hunyuan_dit():
    """It pools a prompt by an attention that reads the weights of its layers."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS, *(f"##{letter}" for letter in LETTERS)]
    bert = transformers.BertConfig(
        vocab_size=len(words),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=80,
    )
    return diffusers.HunyuanDiTPipeline(
        transformer=diffusers.HunyuanDiT2DModel(
            sample_size=16,
            num_layers=2,
            patch_size=2,
            attention_head_dim=32,
            num_attention_heads=2,
            in_channels=4,
            hidden_size=64,
            cross_attention_dim=32,
            cross_attention_dim_t5=64,
            pooled_projection_dim=32,
            activation_fn="gelu-approximate",
        ),
        vae=image_vae(),
        text_encoder=transformers.BertModel(bert),
        tokenizer=transformers.BertTokenizer(vocab={word: index for index, word in enumerate(words)}),
        text_encoder_2=t5(),
        tokenizer_2=t5_tokenizer(),
        scheduler=diffusers.DDPMScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def allegro():
    """Video, by a VAE that decodes in tiles alone."""
    return diffusers.AllegroPipeline(
        transformer=diffusers.AllegroTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=48,
            in_channels=4,
            out_channels=4,
            num_layers=1,
            cross_attention_dim=96,
            sample_width=8,
            sample_height=8,
            sample_frames=8,
            caption_channels=64,
        ),
        vae=diffusers.AutoencoderKLAllegro(
            down_block_types=("AllegroDownBlock3D",) * 4,
            up_block_types=("AllegroUpBlock3D",) * 4,
            block_out_channels=(8, 8, 8, 8),
            latent_channels=4,
            layers_per_block=1,
            norm_num_groups=2,
            sample_size=32,  # pixels of a tile, of 24 frames
        ),
        text_encoder=t5(),
        tokenizer=t5_tokenizer(),
        scheduler=diffusers.DDIMScheduler(),
    )


BUILDERS = {
    "allegro": allegro,
    "animatediff": animate_diff,
    "hunyuandit": hunyuan_dit,
    "kandinsky22": kandinsky_22,
    "ldm": latent_diffusion,
    "pag": perturbed_attention,
    "sdxl": stable_diffusion_xl,
    "stablecascade": stable_cascade_prior,
}
