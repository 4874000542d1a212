"""Model and sampling configurations: frozen, keyword-only, the same classes for tiny and for 14B."""

from __future__ import annotations

import dataclasses
from typing import Literal

# How attention is computed: "cudnn" is the flash kernel of NVIDIA GPUs, for 16-bit models; "auto" takes it
# where it can serve the call, "xla" elsewhere; "chunked" (any device) takes the queries in groups, for
# training on clips whose logits would not fit.
AttentionKind = Literal["xla", "cudnn", "auto", "chunked"]

# Published statistics of the Wan 2.1 latent space (16 channels).
WAN21_LATENT_MEAN = (
    -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
    0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
)  # fmt: skip
WAN21_LATENT_STD = (
    2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
    3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
)  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class VAEConfig:
    """A causal 3D VAE of the Wan 2.1 or Wan 2.2 architecture.

    `kind="wan21"`: convolutions on pixels, 8x in space with four levels.
    `kind="wan22"`: pixels are first folded into channels (`patch`), levels have
    average-down / duplicate-up shortcuts. Space is reduced by `patch * 2**(levels-1)`,
    time by `2**sum(temporal_downsample)`.
    """

    kind: Literal["wan21", "wan22"] = "wan21"
    width: int = 96  # channels of the finest level (encoder)
    decoder_width: int | None = None  # None: as the encoder
    multipliers: tuple[int, ...] = (1, 2, 4, 4)
    res_blocks: int = 2  # per level in the encoder; the decoder has one more
    temporal_downsample: tuple[bool, ...] = (False, True, True)  # one per level but the last
    latent_channels: int = 16
    patch: int = 1
    latent_mean: tuple[float, ...] = WAN21_LATENT_MEAN
    latent_std: tuple[float, ...] = WAN21_LATENT_STD

    @property
    def spatial_factor(self) -> int:
        return self.patch * 2 ** (len(self.multipliers) - 1)

    @property
    def temporal_factor(self) -> int:
        return 2 ** sum(self.temporal_downsample)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DiTConfig:
    """The causal S2V diffusion transformer. Defaults are the published 14B model (Wan2.2-S2V).

    `motion_frames` is (video frames, latent frames) of context before the clip: the audio encoder
    repeats the first audio frame that many times in front and drops that many outputs, and the
    frame packer looks at the newest 19 latent frames whatever its second number is.
    """

    layers: int = 40
    width: int = 5120
    heads: int = 40
    ffn_width: int = 13824
    latent_channels: int = 16
    patch: int = 2  # latent rows and columns per token
    freq_dim: int = 256
    text_dim: int = 4096
    text_len: int = 512
    audio_dim: int = 1024
    audio_layers: int = 25  # hidden states that the learned layer weights mix
    audio_tokens: int = 4  # local tokens per latent frame; one learned padding token is appended
    inject_layers: tuple[int, ...] = (0, 4, 8, 12, 16, 20, 24, 27, 30, 33, 36, 39)
    block_frames: int = 3  # latent frames per block
    motion_frames: tuple[int, int] = (73, 19)
    use_motion: bool = True  # has a frame packer
    use_pose: bool = True  # has a pose condition encoder
    input_skip: bool = False  # the head adds the noisy latent; for models narrower than a patch (`dit.Head`)
    attention: AttentionKind = "xla"

    @property
    def head_dim(self) -> int:
        return self.width // self.heads

    def __post_init__(self) -> None:
        if self.width % self.heads or (self.width // self.heads) % 2:
            raise ValueError(f"width {self.width} must split into {self.heads} heads of an even dimension")
        if self.width % 4:
            raise ValueError(f"width {self.width} must be a multiple of 4, for the audio encoder")
        if any(not 0 <= layer < self.layers for layer in self.inject_layers):
            raise ValueError(f"inject_layers {self.inject_layers} must lie in [0, {self.layers})")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How blocks are denoised, remembered and decoded: every stability mechanism is a switch here.

    The presets below name the variants of the reference; ablations are `dataclasses.replace`.
    """

    steps: int = 4
    shift: float = 3.0
    doubly_shifted: bool = True  # the reference applies the shift twice (last sigma 0.0089)
    ring_blocks: int = 4  # blocks of history including the current one
    # Sink: the reference frame (and packed motion frames) every block attends to.
    sink: bool = True
    motion: bool = True  # packed motion frames are part of the sink
    adapt_sink_after: int | None = 4  # blocks; then the sink becomes the first generated latent (AAS)
    adapt_motion: bool = False  # AAS also re-encodes the motion frames from the decoded video
    # Rolling RoPE: frames that the sink keeps ahead of the block; (low, high) draws one per forward.
    rolling_rope: bool = True
    sink_distance: int | tuple[int, int] = (4, 30)
    half_rope_table: bool = False  # round cosines to float16, as the released code does
    # What the ring remembers: keys of latents at the step's own noise, clean, or at one fixed sigma.
    history: Literal["noisy", "clean", "fixed_noise"] = "noisy"
    history_sigma: float = 0.1  # for "fixed_noise"
    # Where latents come from and how they are decoded.
    reference_copies: Literal[1, 5] = 1  # 5: the image repeated, second latent frame (single-GPU release)
    motion_copies: int = 73  # copies of the image that are encoded as motion frames
    decode: Literal["stream", "clip"] = "stream"
    clip_blocks: int = 4  # blocks per clip, for decode="clip"
    prime_latents: int = 7  # latents of the still image that fill the streaming decoder's caches
    drop_first_frames: int = 3

    def __post_init__(self) -> None:
        for name in ("steps", "ring_blocks", "clip_blocks", "prime_latents", "adapt_sink_after"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.adapt_motion and self.decode != "clip":
            raise ValueError("adapt_motion re-encodes decoded clips and needs decode='clip'")

    @property
    def why_no_pipeline(self) -> str | None:
        """Why only the sequential rollout on one device can sample so; None if a pipeline can too."""
        if self.history != "noisy":
            return f"with history {self.history!r} all steps share one ring of keys"
        if self.decode != "stream":
            return "it decodes whole clips, not a stream"
        return None


# The released single-GPU script (AAS is off there unless --enable_online_decode is passed).
RELEASE_SINGLE = SamplingConfig(
    adapt_sink_after=None, reference_copies=5, motion_copies=5 * 73, decode="clip"
)
# The released five-GPU pipeline.
RELEASE_TPP = SamplingConfig()
# The paper: the sink adapts after block 0 and keeps one distance; no motion frames after stage 2.
PAPER = SamplingConfig(adapt_sink_after=1, motion=False, sink_distance=17)

SAMPLING_PRESETS = {"release-single": RELEASE_SINGLE, "release-tpp": RELEASE_TPP, "paper": PAPER}
