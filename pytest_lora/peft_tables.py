"""PEFT's configurations and tensor names as data: which method knows which key, since when.

Read off the configuration classes of PEFT 0.13 to 0.21 (and, for keys that were already there, of
0.2 to 0.12); kept here so that an adapter can be judged where PEFT is not installed, and so that a
key can be said to be newer than the PEFT that will read it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

__all__ = [
    "METHODS",
    "NEWEST",
    "TASK_TYPES",
    "Method",
    "key_span",
    "minor_version",
]

NEWEST = (0, 21)
"""Newest PEFT whose keys and rules this table knows."""

TASK_TYPES = (
    "SEQ_CLS",
    "SEQ_2_SEQ_LM",
    "CAUSAL_LM",
    "TOKEN_CLS",
    "QUESTION_ANS",
    "FEATURE_EXTRACTION",
)
"""PEFT's task types."""

HEADS: Mapping[str, tuple[str, ...]] = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
"""Modules PEFT adds to ``modules_to_save`` by task type; a model has one of them at most."""

FOREIGN_KEYS: Mapping[str, str] = {
    "lora_dtype": "ms-swift",
    "lorap_lr_ratio": "ms-swift",
    "lorap_emb_lr": "ms-swift",
    "merge_weights": "PEFT 0.2",
}
"""Keys of other writers that no PEFT since 0.3 reads and that do not change what is computed."""

_COMMON = (
    "task_type peft_type auto_mapping base_model_name_or_path revision inference_mode "
    "peft_version@0.18"
)


@dataclass(frozen=True, slots=True)
class Method:
    """One PEFT method.

    Attributes:
        keys: its configuration keys; ``key@0.17`` is known since 0.17, ``key@-0.15`` until then.
        marks: how the names of its tensors begin, in one component of the key.
        parts: the tensors every module it adapts has, where that does not depend on settings.
        rank_dims: ``tensor:dimension`` pairs whose size is the rank.
        since, gone: first PEFT that knows the method, first that no longer does; empty for always.
    """

    keys: str
    marks: str
    parts: str = ""
    rank_dims: str = ""
    since: str = ""
    gone: str = ""

    @property
    def has_targets(self) -> bool:
        """Whether it adapts modules named by ``target_modules``."""
        return "target_modules" in self.keys.split()

    @property
    def learns_prompts(self) -> bool:
        """Whether it wraps no modules, so that the base's names begin at ``base_model.``."""
        return "num_virtual_tokens" in self.keys.split()


METHODS: Mapping[str, Method] = {
    "PROMPT_TUNING": Method(
        "num_virtual_tokens token_dim num_transformer_submodules num_attention_heads "
        "num_layers prompt_tuning_init prompt_tuning_init_text tokenizer_name_or_path "
        "tokenizer_kwargs modules_to_save@0.17",
        "prompt_embeddings",
    ),
    "P_TUNING": Method(
        "num_virtual_tokens token_dim num_transformer_submodules num_attention_heads "
        "num_layers encoder_reparameterization_type encoder_hidden_size encoder_num_layers "
        "encoder_dropout modules_to_save@0.17",
        "prompt_embeddings",
    ),
    "PREFIX_TUNING": Method(
        "num_virtual_tokens token_dim num_transformer_submodules num_attention_heads "
        "num_layers encoder_hidden_size prefix_projection modules_to_save@0.17 "
        "init_weights@0.19",
        "prompt_embeddings",
    ),
    "LORA": Method(
        "r target_modules lora_alpha lora_dropout fan_in_fan_out bias modules_to_save "
        "init_lora_weights layers_to_transform layers_pattern rank_pattern alpha_pattern "
        "use_rslora megatron_config megatron_core loftq_config use_dora layer_replication "
        "runtime_config exclude_modules@0.14 eva_config@0.14 lora_bias@0.14 "
        "trainable_token_indices@0.15 corda_config@0.15 use_qalora@0.16 "
        "qalora_group_size@0.16 target_parameters@0.17 alora_invocation_tokens@0.18 "
        "arrow_config@0.18 ensure_weight_tying@0.18 lora_ga_config@0.19 use_bdlora@0.19 "
        "velora_config@0.20 monteclora_config@0.20 kasa_config@0.21",
        "lora_",
    ),
    "ADALORA": Method(
        "r target_modules lora_alpha lora_dropout fan_in_fan_out bias modules_to_save "
        "init_lora_weights target_r init_r tinit tfinal deltaT beta1 beta2 orth_reg_weight "
        "total_step rank_pattern layers_to_transform layers_pattern alpha_pattern use_rslora "
        "megatron_config megatron_core loftq_config use_dora layer_replication runtime_config "
        "exclude_modules@0.14 eva_config@0.14 lora_bias@0.14 trainable_token_indices@0.15 "
        "corda_config@0.15 use_qalora@0.16 qalora_group_size@0.16 target_parameters@0.17 "
        "alora_invocation_tokens@0.18 arrow_config@0.18 ensure_weight_tying@0.18 "
        "lora_ga_config@0.19 use_bdlora@0.19 velora_config@0.20 monteclora_config@0.20 "
        "kasa_config@0.21",
        "lora_",
        parts="lora_A lora_B lora_E",
    ),
    "ADAPTION_PROMPT": Method(
        "target_modules adapter_len adapter_layers",
        "adaption_",
        parts="adaption_gate adaption_prompt",
    ),
    "IA3": Method(
        "target_modules feedforward_modules fan_in_fan_out modules_to_save init_ia3_weights "
        "exclude_modules@0.14",
        "ia3_",
        parts="ia3_l",
    ),
    "MULTITASK_PROMPT_TUNING": Method(
        "num_virtual_tokens token_dim num_transformer_submodules num_attention_heads "
        "num_layers prompt_tuning_init prompt_tuning_init_text tokenizer_name_or_path "
        "prompt_tuning_init_state_dict_path prompt_tuning_init_task num_ranks num_tasks "
        "tokenizer_kwargs modules_to_save@0.17",
        "prompt_embeddings prefix_task_cols prefix_task_rows",
    ),
    "LOHA": Method(
        "rank_pattern alpha_pattern r alpha rank_dropout module_dropout use_effective_conv2d "
        "target_modules init_weights layers_to_transform layers_pattern modules_to_save "
        "exclude_modules@0.14",
        "hada_",
        parts="hada_w1_a hada_w1_b hada_w2_a hada_w2_b",
        rank_dims="hada_w1_b:0 hada_w2_b:0",
    ),
    "LOKR": Method(
        "rank_pattern alpha_pattern r alpha rank_dropout module_dropout use_effective_conv2d "
        "decompose_both decompose_factor target_modules init_weights layers_to_transform "
        "layers_pattern modules_to_save rank_dropout_scale@0.14 exclude_modules@0.14",
        "lokr_",
    ),
    "OFT": Method(
        "r module_dropout target_modules init_weights layers_to_transform layers_pattern "
        "modules_to_save coft eps block_share rank_pattern@-0.15 alpha_pattern@-0.15 "
        "oft_block_size@0.14 fan_in_fan_out@0.14 bias@0.14 exclude_modules@0.14 "
        "use_cayley_neumann@0.16 num_cayley_neumann_terms@0.16",
        "oft_",
    ),
    "POLY": Method(
        "r target_modules modules_to_save init_weights poly_type n_tasks n_skills n_splits "
        "exclude_modules@0.14",
        "poly_",
    ),
    "BOFT": Method(
        "boft_block_size boft_block_num boft_n_butterfly_factor target_modules boft_dropout "
        "fan_in_fan_out bias modules_to_save init_weights layers_to_transform layers_pattern "
        "exclude_modules@0.14",
        "boft_",
        parts="boft_R boft_s",
    ),
    "LN_TUNING": Method(
        "target_modules modules_to_save exclude_modules@0.14",
        "ln_tuning_",
    ),
    "VERA": Method(
        "r target_modules projection_prng_key save_projection vera_dropout d_initial "
        "fan_in_fan_out bias modules_to_save init_weights layers_to_transform layers_pattern",
        "vera_",
        parts="vera_lambda_b vera_lambda_d",
        rank_dims="vera_lambda_d:0",
    ),
    "FOURIERFT": Method(
        "n_frequency scaling random_loc_seed fan_in_fan_out target_modules bias "
        "modules_to_save layers_to_transform layers_pattern n_frequency_pattern init_weights "
        "exclude_modules@0.14",
        "fourierft_",
        parts="fourierft_spectrum",
    ),
    "XLORA": Method(
        "hidden_size adapters enable_softmax enable_softmax_topk layerwise_scalings "
        "xlora_depth xlora_size xlora_dropout_p use_trainable_adapters softmax_temperature "
        "top_k_lora scaling_pass_value global_scaling_weight",
        "internal_xlora_ xlora_ lora_",
    ),
    "HRA": Method(
        "r apply_GS target_modules init_weights layers_to_transform layers_pattern bias "
        "modules_to_save exclude_modules@0.14",
        "hra_",
        parts="hra_u",
        rank_dims="hra_u:1",
    ),
    "VBLORA": Method(
        "r num_vectors vector_length topk target_modules save_only_topk_weights "
        "vblora_dropout fan_in_fan_out bias modules_to_save init_vector_bank_bound "
        "init_logits_std layers_to_transform layers_pattern exclude_modules@0.14",
        "vblora_",
        parts="vblora_logits_A vblora_logits_B",
    ),
    "CPT": Method(
        "num_virtual_tokens token_dim num_transformer_submodules num_attention_heads "
        "num_layers cpt_token_ids cpt_mask cpt_tokens_type_mask opt_weighted_loss_type "
        "opt_loss_decay_factor opt_projection_epsilon opt_projection_format_epsilon "
        "tokenizer_name_or_path modules_to_save@0.17",
        "prompt_embeddings",
        since="0.14",
    ),
    "BONE": Method(
        "r target_modules exclude_modules init_weights layers_to_transform layers_pattern "
        "bias modules_to_save",
        "bone_",
        since="0.14",
        gone="0.19",
    ),
    "TRAINABLE_TOKENS": Method(
        "token_indices target_modules init_weights",
        "trainable_tokens_",
        since="0.15",
    ),
    "RANDLORA": Method(
        "r target_modules projection_prng_key save_projection sparse very_sparse "
        "randlora_dropout fan_in_fan_out randlora_alpha bias modules_to_save init_weights "
        "layers_to_transform layers_pattern",
        "randlora_",
        since="0.16",
    ),
    "C3A": Method(
        "block_size target_modules bias modules_to_save layers_to_transform layers_pattern "
        "block_size_pattern init_weights",
        "c3a_",
        since="0.16",
    ),
    "MISS": Method(
        "r miss_dropout mini_r target_modules exclude_modules init_weights "
        "layers_to_transform layers_pattern bias modules_to_save",
        "miss_",
        parts="miss_block",
        since="0.17",
    ),
    "SHIRA": Method(
        "r mask_type random_seed target_modules fan_in_fan_out init_weights modules_to_save",
        "shira_",
        since="0.17",
    ),
    "ROAD": Method(
        "variant group_size init_weights target_modules modules_to_save",
        "road_",
        parts="road_alpha road_theta",
        since="0.18",
    ),
    "WAVEFT": Method(
        "n_frequency scaling wavelet_family use_idwt random_loc_seed fan_in_fan_out "
        "target_modules exclude_modules bias modules_to_save layers_to_transform "
        "layers_pattern n_frequency_pattern proportional_parameters init_weights",
        "waveft_",
        since="0.18",
    ),
    "OSF": Method(
        "effective_rank target_modules rank_pattern init_weights modules_to_save target_svd_config",
        "osf_",
        since="0.18",
    ),
    "DELORA": Method(
        "r delora_lambda module_dropout target_modules exclude_modules bias init_weights "
        "layers_to_transform layers_pattern rank_pattern lambda_pattern modules_to_save",
        "delora_",
        parts="delora_A delora_B delora_lambda",
        rank_dims="delora_A:0 delora_B:1",
        since="0.18",
    ),
    "ADAMSS": Method(
        "r num_subspaces subspace_rank target_modules init_weights modules_to_save "
        "layers_to_transform layers_pattern use_asa asa_target_subspaces init_warmup "
        "final_warmup mask_interval asa_importance_beta asa_uncertainty_beta "
        "asa_schedule_exponent use_dynamic_rank svd_threshold random_seed@0.20",
        "adamss_",
        since="0.19",
    ),
    "LILY": Method(
        "r stride_A num_B scaling target_modules exclude_modules modules_to_save "
        "layers_to_transform layers_pattern init_weights",
        "lily_",
        since="0.19",
    ),
    "PVERA": Method(
        "r target_modules projection_prng_key save_projection pvera_dropout d_initial "
        "fan_in_fan_out bias modules_to_save init_weights layers_to_transform layers_pattern "
        "sample_at_inference generator_seed@0.20",
        "pvera_",
        since="0.19",
    ),
    "GRALORA": Method(
        "r hybrid_r target_modules alpha gralora_dropout gralora_k fan_in_fan_out bias "
        "modules_to_save init_weights layers_to_transform layers_pattern",
        "gralora_",
        since="0.19",
    ),
    "CARTRIDGE": Method(
        "num_virtual_tokens token_dim num_transformer_submodules num_attention_heads "
        "num_layers modules_to_save num_frozen_tokens",
        "prompt_embeddings",
        since="0.19",
    ),
    "TINYLORA": Method(
        "r u weight_tying projection_seed save_projection init_v_bound target_modules "
        "tinylora_dropout fan_in_fan_out bias modules_to_save init_weights "
        "layers_to_transform layers_pattern",
        "tinylora_",
        since="0.19",
    ),
    "PSOFT": Method(
        "r target_modules exclude_modules psoft_alpha psoft_dropout fan_in_fan_out "
        "ab_svd_init psoft_svd psoft_svd_lowrank_niter psoft_orth psoft_mag_b psoft_mag_a "
        "use_cayley_neumann num_cayley_neumann_terms cayley_neumann_eps modules_to_save "
        "init_weights layers_to_transform layers_pattern random_seed@0.20",
        "psoft_",
        since="0.19",
    ),
    "PEANUT": Method(
        "r depth act_fn scaling target_modules exclude_modules modules_to_save "
        "layers_to_transform layers_pattern init_weights",
        "peanut_",
        since="0.19",
    ),
    "BEFT": Method(
        "target_modules modules_to_save init_weights",
        "beft_",
        since="0.20",
    ),
    "FROD": Method(
        "target_modules projection_prng_key save_projection frod_dropout fan_in_fan_out bias "
        "modules_to_save init_weights layers_to_transform layers_pattern sparse_rate "
        "regularization_alpha progressbar runtime_offload_base_weight",
        "frod_",
        since="0.20",
    ),
    "GLORA": Method(
        "r target_modules bias modules_to_save config_A_B config_C config_D_E init_weights",
        "glora_",
        since="0.20",
    ),
    "UNILORA": Method(
        "r proj_seed theta_d_length target_modules unilora_dropout fan_in_fan_out bias "
        "modules_to_save init_theta_d_bound init_weights save_indices layers_to_transform "
        "layers_pattern",
        "unilora_",
        since="0.20",
    ),
    "HIRA": Method(
        "r target_modules exclude_modules hira_dropout fan_in_fan_out modules_to_save "
        "init_weights layers_to_transform layers_pattern rank_pattern",
        "hira_",
        parts="hira_A hira_B",
        rank_dims="hira_A:0 hira_B:1",
        since="0.20",
    ),
    "DEFT": Method(
        "r target_modules exclude_modules decomposition_method init_scale alpha para "
        "fan_in_fan_out deft_dropout init_weights layers_to_transform layers_pattern bias "
        "modules_to_save",
        "deft_",
        since="0.20",
    ),
    "SHADOW": Method(
        "target_modules exclude_modules r shadow_alpha shadow_dropout init_weights "
        "shadow_model shadow_num_hidden_layers shadow_hidden_size shadow_num_attention_heads "
        "shadow_intermediate_size share_embeddings update_hidden_size auxiliary_loss_weight "
        "layers_to_transform layers_pattern modules_to_save",
        "shadow_",
        since="0.21",
    ),
    "SUPERTUNING": Method(
        "target_modules modules_to_save sparsity select_top r lora_alpha lora_dropout "
        "init_weights save_precomputed_indices",
        "supertuning_",
        since="0.21",
    ),
}
"""Every method of :data:`NEWEST` and those removed since 0.13, by ``peft_type``."""


def key_span(method: str, key: str) -> tuple[str, str] | None:
    """``(since, until)`` for a configuration key, empty for always; None for an unknown key."""
    for known, since, until in _keys(method):
        if known == key:
            return since, until
    return None


def _keys(method: str) -> Iterator[tuple[str, str, str]]:
    words = METHODS[method].keys.split() if method in METHODS else []
    for word in (*_COMMON.split(), *words):
        key, _, version = word.partition("@")
        if version.startswith("-"):
            yield key, "", version[1:]
        else:
            yield key, version, ""


def minor_version(text: str) -> tuple[int, int] | None:
    """``(major, minor)`` at the beginning of a version, None where there is none."""
    match = re.match(r"(\d{1,6})\.(\d{1,6})(?!\d)", text)
    return (int(match[1]), int(match[2])) if match else None
