"""The sizes of a model, refused where they do not fit together (report 4.2)."""

from dataclasses import dataclass

from dsv3_jax.settings import require


@dataclass(frozen=True)
class YarnConfig:
    """YaRN context extension of the decoupled rotary part (report 4.3)."""

    factor: float = 40.0
    """How many times longer the context becomes."""
    original_length: int = 4096
    """Sequence length the model was trained at before extension."""
    beta_fast: float = 32.0
    """Frequencies that turn more often than this over the original length are kept."""
    beta_slow: float = 1.0
    """Frequencies that turn less often than this over the original length are fully interpolated."""
    mscale: float | None = 1.0
    """Temperature of cos and sin, relative to `mscale_all_dim`. None: absent from the checkpoint."""
    mscale_all_dim: float | None = 1.0
    """Temperature of the softmax scale. None: absent, the softmax scale is not changed."""
    attention_factor: float | None = None
    """Multiplies cos and sin; None derives it from the two mscales."""
    truncate: bool = True
    """Round the ends of the interpolation ramp to whole frequencies."""

    def __post_init__(self) -> None:
        require(self.factor >= 1, "yarn.factor", self.factor, "use a factor of at least 1")
        require(self.original_length > 0, "yarn.original_length", self.original_length, "use a positive length")
        require(
            self.beta_fast > self.beta_slow,
            "yarn.beta_fast",
            self.beta_fast,
            f"must be above yarn.beta_slow={self.beta_slow}",
        )


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of a DeepSeek-V3 model (report 4.2). The defaults are small enough for a laptop."""

    vocab_size: int = 4096
    """Rows of the embedding and of the output head."""
    d_model: int = 256
    """Width of the residual stream."""
    num_layers: int = 5
    """Transformer layers of the main model, dense ones included."""
    num_dense_layers: int = 1
    """First layers, whose FFN is dense."""
    d_ff: int = 768
    """FFN width of the dense layers."""
    num_heads: int = 8
    """Attention heads."""
    qk_nope_head_dim: int = 32
    """Per-head query/key width without position."""
    qk_rope_head_dim: int = 16
    """Per-head query width, and shared key width, that carries RoPE."""
    v_head_dim: int = 32
    """Per-head value width."""
    q_lora_rank: int | None = 128
    """Width of the compressed query latent; None projects queries directly."""
    kv_lora_rank: int = 64
    """Width of the compressed key/value latent, which is what decoding caches."""
    num_experts: int = 16
    """Routed experts of a MoE layer."""
    num_shared_experts: int = 1
    """Experts that every token passes."""
    d_ff_expert: int = 192
    """FFN width of one expert."""
    top_k: int = 4
    """Routed experts a token passes."""
    num_groups: int = 4
    """Groups the routed experts are divided into."""
    top_k_groups: int = 2
    """Groups a token's experts may come from."""
    routed_scaling_factor: float = 2.5
    """Multiplies the normalized routing weights."""
    normalize_top_k: bool = True
    """Divide the selected routing weights by their sum."""
    num_mtp_modules: int = 1
    """Multi-token prediction depths (report 2.2)."""
    rope_theta: float = 10000.0
    """RoPE base."""
    yarn: YarnConfig | None = None
    """Context extension; None is plain RoPE."""
    max_length: int = 4096
    """Longest sequence the model is meant for."""
    rms_norm_eps: float = 1e-6
    """Added to the mean square in RMSNorm."""
    init_std: float = 0.006
    """Standard deviation of every weight matrix at initialization."""

    def __post_init__(self) -> None:
        positive = [
            "vocab_size", "d_model", "num_layers", "d_ff", "num_heads", "qk_nope_head_dim", "qk_rope_head_dim",
            "v_head_dim", "kv_lora_rank", "num_experts", "d_ff_expert", "top_k", "num_groups", "top_k_groups",
            "max_length",
        ]  # fmt: skip
        for name in positive:
            require(getattr(self, name) > 0, f"model.{name}", getattr(self, name), "must be positive")
        require(
            self.q_lora_rank is None or self.q_lora_rank > 0,
            "model.q_lora_rank",
            self.q_lora_rank,
            "use a positive rank, or None for queries without compression",
        )
        require(self.num_shared_experts >= 0, "model.num_shared_experts", self.num_shared_experts, "cannot be negative")
        require(self.num_mtp_modules >= 0, "model.num_mtp_modules", self.num_mtp_modules, "cannot be negative")
        require(
            self.qk_rope_head_dim % 2 == 0,
            "model.qk_rope_head_dim",
            self.qk_rope_head_dim,
            "must be even: RoPE rotates pairs",
        )
        require(
            0 <= self.num_dense_layers <= self.num_layers,
            "model.num_dense_layers",
            self.num_dense_layers,
            f"must lie between 0 and model.num_layers={self.num_layers}",
        )
        require(
            self.num_experts % self.num_groups == 0,
            "model.num_experts",
            self.num_experts,
            f"must be a multiple of model.num_groups={self.num_groups}",
        )
        require(
            self.top_k_groups <= self.num_groups,
            "model.top_k_groups",
            self.top_k_groups,
            f"a token cannot reach more than model.num_groups={self.num_groups} groups",
        )
        require(
            self.top_k <= self.reachable_experts,
            "model.top_k",
            self.top_k,
            f"model.top_k_groups={self.top_k_groups} groups hold only {self.reachable_experts} experts: "
            "lower top_k or raise top_k_groups",
        )
        require(
            self.num_groups == 1 or self.num_experts // self.num_groups >= 2,
            "model.num_groups",
            self.num_groups,
            "a group's score is the sum of its two best experts, so a group needs at least 2: use fewer groups",
        )
        for name in ("init_std", "rope_theta", "rms_norm_eps", "routed_scaling_factor"):
            require(getattr(self, name) > 0, f"model.{name}", getattr(self, name), "must be positive")

    @property
    def qk_head_dim(self) -> int:
        """Per-head width of queries and keys."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def num_moe_layers(self) -> int:
        """Layers of the main model whose FFN is a mixture of experts."""
        return self.num_layers - self.num_dense_layers

    @property
    def reachable_experts(self) -> int:
        """Experts in the groups that one token may reach."""
        return self.num_experts // self.num_groups * self.top_k_groups
