"""Tiny pipelines of each family of diffusion models: their real classes, random weights (plumbing, not quality)."""

import re
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    LatentConsistencyModelPipeline,
    LCMScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextModel, CLIPTextModelWithProjection, T5Config, T5EncoderModel

from d4m_plugin.pretraining import byte_tokenizer, text_config

WIDTH = 32  # of each text encoder


def _text(kind=CLIPTextModel):
    tokenizer = byte_tokenizer()
    widths = {"hidden_size": WIDTH, "intermediate_size": WIDTH, "projection_dim": WIDTH}
    return kind(text_config(tokenizer, **widths, num_hidden_layers=2, num_attention_heads=2))


def _t5(width=WIDTH):
    return T5EncoderModel(
        T5Config(vocab_size=len(byte_tokenizer()), d_model=width, d_ff=WIDTH, d_kv=8, num_layers=1, num_heads=2)
    )


def _vae(channels=4, **options):
    return AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        block_out_channels=[16, 16],
        norm_num_groups=8,
        latent_channels=channels,
        sample_size=16,
        **options,
    )


def _unet(**options):
    return UNet2DConditionModel(
        **{
            "sample_size": 8,
            "in_channels": 4,
            "out_channels": 4,
            "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
            "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
            "block_out_channels": [16, 32],
            "norm_num_groups": 8,
            "layers_per_block": 1,
            "cross_attention_dim": WIDTH,
            "attention_head_dim": 2,
        }
        | options
    )


def _scheduler(kind=DDIMScheduler, **options):
    return kind(clip_sample=False, steps_offset=1, set_alpha_to_one=False, beta_schedule="scaled_linear", **options)


def _of_stable_diffusion(pipeline=StableDiffusionPipeline, scheduler=None, **unet):
    return pipeline(
        vae=_vae(),
        text_encoder=_text(),
        tokenizer=byte_tokenizer(),
        unet=_unet(**unet),
        scheduler=scheduler or _scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def sd():
    return _of_stable_diffusion()


def sd_v_prediction():
    return _of_stable_diffusion(scheduler=_scheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True))


def lcm():
    return _of_stable_diffusion(LatentConsistencyModelPipeline, _scheduler(LCMScheduler), time_cond_proj_dim=32)


def sdxl():
    return StableDiffusionXLPipeline(
        vae=_vae(force_upcast=True),
        text_encoder=_text(),
        text_encoder_2=_text(CLIPTextModelWithProjection),
        tokenizer=byte_tokenizer(),
        tokenizer_2=byte_tokenizer(),
        unet=_unet(
            cross_attention_dim=2 * WIDTH,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + WIDTH,
            use_linear_projection=True,
        ),
        scheduler=_scheduler(),
    )


def sd3():
    return StableDiffusion3Pipeline(
        vae=_vae(16, shift_factor=0.06, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=_text(CLIPTextModelWithProjection),
        text_encoder_2=_text(CLIPTextModelWithProjection),
        text_encoder_3=_t5(2 * WIDTH),
        tokenizer=byte_tokenizer(),
        tokenizer_2=byte_tokenizer(),
        tokenizer_3=byte_tokenizer(),
        transformer=SD3Transformer2DModel(
            sample_size=8,
            patch_size=1,
            in_channels=16,
            out_channels=16,
            num_layers=1,
            attention_head_dim=8,
            num_attention_heads=4,
            joint_attention_dim=2 * WIDTH,
            caption_projection_dim=32,
            pooled_projection_dim=2 * WIDTH,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


def flux():
    return FluxPipeline(
        vae=_vae(16, shift_factor=0.1, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=_text(),
        text_encoder_2=_t5(),
        tokenizer=byte_tokenizer(),
        tokenizer_2=byte_tokenizer(),
        transformer=FluxTransformer2DModel(
            patch_size=1,
            in_channels=64,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=WIDTH,
            pooled_projection_dim=WIDTH,
            axes_dims_rope=(4, 4, 8),
            guidance_embeds=True,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
    )


FAMILIES = {each.__name__: each for each in (sd, sd_v_prediction, lcm, sdxl, sd3, flux)}


def save(family: str, folder: Path) -> Path:
    torch.manual_seed(0)
    FAMILIES[family]().save_pretrained(folder)
    return folder


# From the names of Stable Diffusion's weights in diffusers to those of the original checkpoints, for the sizes here.
ORIGINAL_NAMES = {
    "unet": {
        r"^time_embedding\.linear_1": "time_embed.0",
        r"^time_embedding\.linear_2": "time_embed.2",
        r"^conv_in": "input_blocks.0.0",
        r"^down_blocks\.0\.resnets\.0": "input_blocks.1.0",
        r"^down_blocks\.0\.downsamplers\.0\.conv": "input_blocks.2.0.op",
        r"^down_blocks\.1\.resnets\.0": "input_blocks.3.0",
        r"^down_blocks\.1\.attentions\.0": "input_blocks.3.1",
        r"^mid_block\.resnets\.0": "middle_block.0",
        r"^mid_block\.attentions\.0": "middle_block.1",
        r"^mid_block\.resnets\.1": "middle_block.2",
        r"^up_blocks\.0\.resnets\.(.)": r"output_blocks.\1.0",
        r"^up_blocks\.0\.attentions\.(.)": r"output_blocks.\1.1",
        r"^up_blocks\.0\.upsamplers\.0": "output_blocks.1.2",
        r"^up_blocks\.1\.resnets\.0": "output_blocks.2.0",
        r"^up_blocks\.1\.resnets\.1": "output_blocks.3.0",
        r"^conv_norm_out": "out.0",
        r"^conv_out": "out.2",
        r"^((?:input|middle|output)_blocks?\.[\d.]+)norm1\.": r"\1in_layers.0.",
        r"^((?:input|middle|output)_blocks?\.[\d.]+)conv1\.": r"\1in_layers.2.",
        r"^((?:input|middle|output)_blocks?\.[\d.]+)time_emb_proj\.": r"\1emb_layers.1.",
        r"^((?:input|middle|output)_blocks?\.[\d.]+)norm2\.": r"\1out_layers.0.",
        r"^((?:input|middle|output)_blocks?\.[\d.]+)conv2\.": r"\1out_layers.3.",
        r"conv_shortcut": "skip_connection",
        r"^": "model.diffusion_model.",
    },
    "vae": {
        r"conv_norm_out": "norm_out",
        r"down_blocks\.(.)\.resnets": r"down.\1.block",
        r"down_blocks\.0\.downsamplers\.0": "down.0.downsample",
        r"mid_block\.resnets\.0": "mid.block_1",
        r"mid_block\.resnets\.1": "mid.block_2",
        r"mid_block\.attentions\.0\.group_norm": "mid.attn_1.norm",
        r"mid_block\.attentions\.0\.to_([qkv])": r"mid.attn_1.\1",
        r"mid_block\.attentions\.0\.to_out\.0": "mid.attn_1.proj_out",
        r"up_blocks\.0\.resnets": "up.1.block",
        r"up_blocks\.1\.resnets": "up.0.block",
        r"up_blocks\.0\.upsamplers\.0": "up.1.upsample",
        r"^": "first_stage_model.",
    },
    "text_encoder": {r"^": "cond_stage_model.transformer.text_model."},
}


def in_one_file(pipeline):
    """Return the weights of a Stable Diffusion pipeline under the names of the original checkpoints."""
    weights = {}
    for part, names in ORIGINAL_NAMES.items():
        for name, tensor in getattr(pipeline, part).state_dict().items():
            for pattern, original in names.items():
                name = re.sub(pattern, original, name)
            weights[name] = tensor
    return weights
