"""Keys of other tools (transformers' TrainingArguments, PEFT, TRL, Axolotl, LLaMA-Factory), and what they are here."""

from __future__ import annotations

_NO_FLOAT16 = "float16 would need loss scaling"
_BY_LAUNCHER = "processes are started by torchrun; parallel.shard, parallel.expert and parallel.replicate cut the model"

_SAME: dict[str, tuple[str, ...]] = {
    "model.path": ("model_name_or_path", "model_name", "base_model", "pretrained_model_name_or_path", "model_id"),
    "model.storage": ("quantization", "quantization_bit", "quant_type", "bnb_4bit_quant_type", "bits"),
    "model.storage: nf4": ("load_in_4bit", "qlora"),
    "model.storage: int8": ("load_in_8bit",),
    "model.double_quant": ("bnb_4bit_use_double_quant", "double_quantization", "use_double_quant"),
    "model.dtype": ("torch_dtype", "bnb_4bit_compute_dtype", "compute_dtype", "precision", "mixed_precision"),
    "model.dtype: bfloat16": ("bf16", "pure_bf16"),
    f"model.dtype: bfloat16 ({_NO_FLOAT16})": ("fp16", "float16", "half"),
    "model.dtype: float32": ("fp32",),
    "adapter": ("lora", "peft", "peft_config", "lora_config"),
    "adapter.kind": ("finetuning_type", "adapter_type", "use_lora", "use_peft"),
    "adapter.rank": ("lora_r", "lora_rank", "r", "lora_dim", "rank_pattern"),
    "adapter.alpha": ("lora_alpha", "alpha_pattern"),
    "adapter.targets": ("lora_target_modules", "target_modules", "lora_target", "target_parameters"),
    "adapter.rslora": ("use_rslora", "lora_use_rslora"),
    "adapter.layers": ("layers_to_transform", "lora_layers_to_transform", "num_layers"),
    "adapter.init_from": ("lora_model_dir", "adapter_name_or_path", "lora_weights"),
    "data": ("dataset_config", "data_args"),
    "data.train": ("train_file", "dataset", "datasets", "data_path", "dataset_name", "train_files"),
    "data.eval": ("validation_file", "eval_file", "test_datasets", "eval_dataset", "val_file"),
    "data.eval_fraction": ("val_set_size", "val_size", "test_size", "validation_split"),
    "data.fields": ("dataset_text_field", "field_messages", "columns", "column_mapping"),
    "data.sequence_length": ("max_length", "max_seq_length", "max_seq_len", "cutoff_len", "sequence_len", "block_size"),
    "data.packing": ("sample_packing", "neat_packing", "pack_sequences"),
    "train": ("training", "training_args", "training_arguments", "trainer", "train_args"),
    "train.micro_batch_size": ("batch_size", "per_device_train_batch_size", "train_batch_size", "micro_batch"),
    "train.gradient_accumulation": ("gradient_accumulation_steps", "grad_accum", "accumulate_grad_batches"),
    "train.epochs": ("num_epochs", "num_train_epochs", "n_epochs", "max_epochs"),
    "train.max_steps": ("total_steps", "num_steps", "iters", "max_iters"),
    "train.optimizer": ("optim", "optimizer_name", "optimizer_type"),
    "train.learning_rate": ("lr", "max_lr", "base_lr"),
    "train.schedule": ("lr_scheduler", "lr_scheduler_type", "scheduler", "lr_schedule"),
    "train.warmup_ratio, a share of the steps": ("warmup_steps", "warmup", "num_warmup_steps"),
    "train.max_grad_norm": ("gradient_clipping", "grad_clip", "clip_grad_norm", "max_norm"),
    "train.betas": ("adam_beta1", "adam_beta2", "beta1", "beta2"),
    "train.eps": ("adam_epsilon", "epsilon", "adam_eps"),
    "train.activation_checkpointing": ("gradient_checkpointing", "use_gradient_checkpointing", "grad_checkpoint"),
    "train.log_every": ("logging_steps", "log_interval", "log_steps"),
    "train.eval_every": ("eval_steps", "evals_per_epoch", "eval_interval", "val_steps"),
    "train.keep_best": ("load_best_model_at_end", "save_best"),
    "train.patience": ("early_stopping_patience", "early_stopping", "early_stopping_rounds"),
    "train.patience_delta": ("early_stopping_threshold", "min_delta"),
    "train.save_every": ("save_steps", "saves_per_epoch", "checkpoint_every", "save_interval"),
    "train.keep_checkpoints": ("save_total_limit", "keep_last"),
    "train.resume": ("resume_from_checkpoint", "resume_from", "auto_resume_from_checkpoints"),
    "train.seed": ("random_seed", "data_seed"),
    "train.balance": ("router_aux_loss", "output_router_logits"),
    "train.balance_rate": ("router_aux_loss_coef", "aux_loss_coef"),
    "train.tensorboard": ("report_to", "use_tensorboard"),
    "parallel.cpu_offload": ("offload", "fsdp_offload_params"),
    "parallel.expert": ("expert_parallel_size", "ep_size", "expert_model_parallel_size"),
    "output.dir": ("output_dir", "out_dir", "save_dir", "output_path", "run_dir"),
}
_OF = {foreign.lower(): ours for ours, names in _SAME.items() for foreign in names}
_NONE = {
    "lora_dropout": "There is no dropout here; leave it out",
    "lora_bias": "Biases aren't trained with LoRA here; leave it out",
    "use_dora": "DoRA isn't supported; leave it out",
    "deepspeed": f"There is no DeepSpeed here: {_BY_LAUNCHER}",
    "fsdp": f"Leave it out: {_BY_LAUNCHER}",
    "fsdp_config": f"Leave it out: {_BY_LAUNCHER}",
    "num_gpus": f"Leave it out: {_BY_LAUNCHER}",
    "gpus": f"Leave it out: {_BY_LAUNCHER}",
    "chat_template": "The checkpoint's own template is used: put chat_template.jinja into model.path; leave it out",
    "train_on_inputs": "Loss is on the assistant's turns, or the completion, as data.format says; leave it out",
    "trust_remote_code": "No code of a checkpoint is run here; leave it out",
    "attn_implementation": "Attention is chosen by the device here; leave it out",
    "flash_attention": "Attention is chosen by the device here; leave it out",
}


def hint(key: str) -> str | None:
    """What a key of another tool is here, as a sentence; None for a key that none of them has."""
    name = key.lower().replace("-", "_")
    if name in _OF:
        return f"Here that is {_OF[name]}."
    return f"{_NONE[name]}." if name in _NONE else None
