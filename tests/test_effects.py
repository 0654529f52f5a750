"""Every setting has a test of what it does, not of how it is parsed: a key that is in none of these fails here.

A named test must exist, and its file, or a helper of its room, must use the key. What a key means is said in
shared/CONFIG.md.
"""

import ast
import re
from pathlib import Path

import pytest

from shared.config import leaf_keys

TESTS = Path(__file__).parent
# file :: test (without "test_") : keys
EFFECTS = """
train/test_run :: a_model_of_another_family_is_refused : model_type
train/test_run :: experts_share_the_steps_by_probability_or_as_told : expert expert_share timestep_distribution
train/test_run :: rates_follow_warmup_and_schedule : lr_scheduler warmup_steps
train/test_run :: the_command_trains_two_experts_explains_and_exports : base_model_name
train/test_method :: a_method_lowers_the_held_out_loss_and_resumes_bit_equal : training_method peft_type train_dtype \
optimizer.name optimizer.rounding learning_rate embedding_learning_rate embedding.kind transformer.train \
text_encoder.train text_encoder.learning_rate
train/test_method :: an_embedding_file_says_how_to_use_it : embedding.token_count embedding.placeholder \
embedding.initial_text
train/test_method :: looking_at_a_schedule_free_run_changes_nothing_and_its_results_are_the_averages : validate_after \
output_dtype
train/test_data :: a_plan_can_start_anywhere : epochs max_steps
train/test_data :: a_slots_draws_do_not_depend_on_the_others : seed
train/test_data :: captions_are_dropped_at_their_rate_and_chosen_evenly : caption_dropout_probability
train/test_data :: images_take_the_whole_batch_videos_their_share : batch_size video_config.video_batch_size_multiplier
train/test_data :: micro_batches_and_threads_change_nothing_but_the_cut : dataloader_threads
train/test_data :: noise_is_normal_and_stratified_sigmas_fill_their_strata : timestep_stratified
train/test_data :: prior_samples_come_at_their_ratio_and_take_turns : prior.ratio
train/test_data :: prior_weight_scales_prior_samples_alone : prior.weight
train/test_data :: variants_are_drawn_only_when_asked_for : video_config.temporal_augmentation
train/test_objective :: the_loss_is_the_reference : loss first_frame_conditioning_probability \
video_config.frame_dropout_probability video_config.temporal_consistency_weight
train/test_objective :: attention_inside_frames_lets_no_frame_see_another : video_config.use_temporal_attention
train/test_objective :: prior_prediction_pulls_prior_samples_nowhere : prior.prediction
train/test_settings :: gradients_are_clipped_and_rates_are_the_parts_own : max_grad_norm transformer.learning_rate \
optimizer.eps
train/test_settings :: the_training_shift_is_the_models_unless_set : timestep_shift
train/test_settings :: the_average_follows_its_recursion_and_has_a_file_of_its_own : ema
train/test_settings :: validation_is_before_after_and_between : validation.timesteps
train/test_settings :: results_on_the_way_and_where_they_are_wanted : save_after output_model_destination
train/test_settings :: backups_results_and_previews_count_in_their_own_units : backup_after_unit save_after_unit \
sample_after_unit
train/test_settings :: deterministic_runs_use_deterministic_kernels : deterministic
train/test_settings :: an_optimizers_numbers_change_its_update : optimizer.beta1 optimizer.beta2 optimizer.weight_decay
train/test_resume :: old_checkpoints_go_the_newest_stay : backup_after backup_keep
train/test_sample :: a_run_samples_before_and_after_and_outlives_its_decoders : sample_prompts sample_after
train/test_sample :: scenes_follow_the_config_and_sizes_the_grid : sample_seed sample_steps \
sample_guidance_scale sample_negative_prompt
train/test_export :: stock_diffusers_gives_our_output : lora_alpha lora_rank lora_targets
train/test_export :: training_can_start_from_a_file_of_any_format : resume_from_adapter
train/test_export :: a_fine_tune_is_a_diffusers_folder_or_one_file_with_original_names : output_model_format
train/test_dropout :: no_way_of_computing_a_step_changes_what_is_dropped : lora_dropout
train/test_merge :: what_is_stored_is_the_merged_weight : base_adapters
train/test_memory :: auto_takes_the_first_placement_that_fits : gradient_checkpointing layer_offload_fraction
train/test_memory :: flops_are_those_torch_counts_in_a_real_step : transformer.weight_dtype
train/test_text_encoder :: frozen_weights_are_stored_as_asked : text_encoder.weight_dtype
encode/test_encode :: weights_are_used_in_the_precision_that_is_set : vae.weight_dtype
encode/test_encode :: tiles_are_encoded_where_they_are_asked_for : vae.tiling
shared/test_single_file :: settings_name_files : vae.model_name text_encoder.model_name
shared/test_config :: wanted_compression_scales_sides_frames_and_fps_together : resolution \
video_config.spatial_compression_ratio video_config.temporal_compression_ratio
shared/test_config :: the_smaller_of_frames_and_max_frames_counts : frames video_config.max_frames
ingest/test_time :: keyframe_windows_begin_at_keyframes : video_config.frame_sample_strategy windows_per_clip
ingest/test_time :: stretch_spreads_frames_over_the_whole_clip : video_config.stretch
ingest/test_time :: frames_are_resampled_by_time : video_config.target_fps
ingest/test_time :: long_sources_are_cut_at_scene_changes_and_no_window_crosses_one : video_config.max_duration
ingest/test_spine :: files_smaller_than_their_bucket_are_counted : video_config.min_resolution
ingest/test_spine :: max_resolution_bounds_the_longer_side : video_config.max_resolution
ingest/test_spine :: the_kept_part_is_the_middle_or_the_top : crop
ingest/test_spine :: the_index_knows_each_tar_by_hash_and_order : shard_megabytes
ingest/test_spine :: a_source_shorter_than_the_user_wants_is_dropped : gates.min_duration
ingest/test_spine :: concepts_priors_and_validation_come_from_sub_folders : caption_prefix concepts prior.folders \
validation.folder
ingest/test_spine :: a_fraction_is_held_out_by_content : validation.fraction
ingest/test_colour :: red_survives_without_loss : codec
ingest/test_gates :: a_frozen_clip_is_dropped_unless_the_gate_is_off : gates.frozen
ingest/test_gates :: a_black_clip_is_dropped_and_a_dark_one_kept : gates.black
ingest/test_gates :: a_re_encoded_copy_is_a_near_duplicate_and_another_clip_is_not : gates.near_duplicate
ingest/test_gates :: gates_judge_by_the_measures : gates.min_motion gates.max_motion gates.min_sharpness
ingest/test_gates :: bars_are_cut_away_before_bucketing : gates.letterbox
ingest/test_captioner :: what_is_missing_is_written_once_and_edits_are_obeyed : caption.model caption.prompt \
caption.frames caption.batch_size
ingest/test_discover :: file_names_are_no_captions_where_they_are_not_wanted : caption.from_file_names
train/test_attention :: the_choice_follows_what_is_asked_and_installed : attention
train/test_blockwise :: fused_equals_a_bare_loop_that_clips_each_block : clip
train/test_settings :: blocks_are_compiled_when_asked_for : compile
"""


def entries() -> list[tuple[str, str, list[str]]]:
    lines = EFFECTS.replace("\\\n", "").strip().splitlines()
    return [(file, name, keys.split()) for file, name, keys in (re.split(" :: | : ", line) for line in lines)]


def test_every_setting_has_a_test_of_its_effect() -> None:
    tested = [key for _, _, keys in entries() for key in keys]
    assert sorted(tested) == sorted(leaf_keys())


@pytest.mark.parametrize(("file", "name", "keys"), entries())
def test_a_test_of_an_effect_is_there_and_uses_the_setting(file: str, name: str, keys: list[str]) -> None:
    text = (TESTS / f"{file}.py").read_text()
    functions = {node.name for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)}
    assert f"test_{name}" in functions
    helpers = [path for path in (TESTS / file).parent.glob("*.py") if not path.name.startswith("test_")]
    used = text + "".join(path.read_text() for path in helpers)
    assert [key for key in keys if not re.search(rf"\b{key.rpartition('.')[2]}\b", used)] == []
