"""Files of other trainers, as their documentation shows them."""

MUSUBI = """
[general]
resolution = [960, 544]
caption_extension = ".txt"
batch_size = 2
enable_bucket = true
bucket_no_upscale = true

[[datasets]]
video_directory = "dogs"
cache_directory = "/somewhere/cache"
target_frames = [1, 25, 45]
frame_extraction = "uniform"
frame_sample = 3
num_repeats = 4
source_fps = 30.0

[[datasets]]
video_jsonl_file = "cats.jsonl"
target_frames = [45]
frame_extraction = "chunk"
"""
PIPE_DATA = """
resolutions = [512]
enable_ar_bucket = true
min_ar = 0.5
frame_buckets = [1, 33]
[[directory]]
path = 'dogs'
num_repeats = 5
[[directory]]
path = 'videos'
mask_path = 'masks'
"""
PIPE = """
output_dir = '/data/runs'
dataset = 'data.toml'
epochs = 100
micro_batch_size_per_gpu = 2
gradient_accumulation_steps = 4
gradient_clipping = 1.0
warmup_steps = 10
blocks_to_swap = 20
save_every_n_epochs = 2
save_dtype = 'bfloat16'
[model]
type = 'wan'
ckpt_path = '/data/imagegen_models/Wan2.2-T2V-A14B'
dtype = 'bfloat16'
transformer_dtype = 'float8'
timestep_sample_method = 'logit_normal'
min_t = 0
max_t = 0.875
[adapter]
type = 'lora'
rank = 32
dtype = 'bfloat16'
[optimizer]
type = 'adamw_optimi'
lr = 2e-5
betas = [0.9, 0.99]
weight_decay = 0.01
eps = 1e-8
[monitoring]
enable_wandb = false
"""
TOOLKIT = """
job: extension
config:
  name: "my_lora"
  process:
    - type: 'sd_trainer'
      training_folder: "output"
      device: cuda:0
      trigger_word: "zorb"
      network: {type: "lora", linear: 16, linear_alpha: 8, conv: 4}
      save: {dtype: float16, save_every: 250, max_step_saves_to_keep: 4}
      datasets:
        - folder_path: "dogs"
          caption_ext: "txt"
          caption_dropout_rate: 0.05
          num_frames: 41
          shrink_video_to_frames: true
          resolution: [512, 768]
          num_repeats: 2
          flip_x: false
        - folder_path: "cats"
          caption_ext: "caption"
          is_reg: true
      train:
        batch_size: 1
        steps: 2000
        gradient_accumulation: 2
        gradient_checkpointing: true
        noise_scheduler: "flowmatch"
        timestep_type: 'sigmoid'
        optimizer: "adamw8bit"
        lr: 1e-4
        optimizer_params: {weight_decay: 1e-4}
        dtype: bf16
        switch_boundary_every: 10
        ema_config: {use_ema: true, ema_decay: 0.99}
      model:
        name_or_path: "ai-toolkit/Wan2.2-T2V-A14B-Diffusers-bf16"
        arch: 'wan22_14b'
        quantize: true
        qtype: "qfloat8"
        model_kwargs: {train_high_noise: true, train_low_noise: false}
      sample:
        sample_every: 250
        prompts: ["[trigger] rolls down a hill"]
        neg: ""
        seed: 0
        guidance_scale: 3.5
        sample_steps: 25
        walk_seed: true
meta: {name: "[name]", version: '1.0'}
"""
