"""A whole pipeline of diffusers with tiny random parts, saved by diffusers itself."""

from pathlib import Path

from data_pipelines.stages.random_encoders import make_random_encoders

CAPTIONS = ["a red circle and a blue square", "two green triangles", "a photo of a red cube"]
SHIFT = 2.5  # unlike any default


def save_pipeline(folder: Path, encoders: Path) -> None:
    """Writes model_index.json, the three text encoders with tokenizers, VAE, MM-DiT, scheduler.

    The positions are those that diffusers makes when nothing is stored: not ours.

    Args:
        folder: of the pipeline.
        encoders: where the tokenizers and text encoders are made.
    """
    import torch
    import transformers
    from diffusers import (
        AutoencoderKL,
        FlowMatchEulerDiscreteScheduler,
        SD3Transformer2DModel,
        StableDiffusion3Pipeline,
    )

    paths = make_random_encoders(encoders, CAPTIONS)
    torch.manual_seed(0)
    clip_l = transformers.CLIPTextConfig.from_pretrained(paths["clip_l"])
    pipeline = StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=4,
            num_layers=2,
            attention_head_dim=64,
            num_attention_heads=2,
            joint_attention_dim=128,
            caption_projection_dim=128,
            pooled_projection_dim=128,
            out_channels=4,
            pos_embed_max_size=10,
            qk_norm="rms_norm",
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=SHIFT),
        vae=AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            block_out_channels=(8, 16, 16),
            layers_per_block=1,
            latent_channels=4,
            norm_num_groups=8,
            scaling_factor=1.3,
            shift_factor=0.05,
            use_quant_conv=False,
            use_post_quant_conv=False,
        ),
        # With a projection, as in the published pipeline, and one that is not the identity.
        text_encoder=transformers.CLIPTextModelWithProjection(clip_l),
        tokenizer=transformers.CLIPTokenizer.from_pretrained(paths["clip_l"]),
        text_encoder_2=transformers.CLIPTextModelWithProjection.from_pretrained(paths["clip_g"]),
        tokenizer_2=transformers.CLIPTokenizer.from_pretrained(paths["clip_g"]),
        text_encoder_3=transformers.T5EncoderModel.from_pretrained(paths["t5"]),
        tokenizer_3=transformers.AutoTokenizer.from_pretrained(paths["t5"]),
    )
    pipeline.save_pretrained(folder, safe_serialization=True)
