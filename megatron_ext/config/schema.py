"""The configuration, as frozen dataclasses. `conf/` holds the YAML that Hydra composes into them; no torch here.

Units: lengths in tokens, batches in samples (sequences), times in seconds, learning rates per step.
"""
from dataclasses import dataclass, field

from megatron_ext.curate.config import CurateConfig


@dataclass(frozen=True)
class StageConfig:
    name: str = "pretrain"


@dataclass(frozen=True)
class ModelConfig:
    """A decoder, an encoder, or both. `None` means: derived from the other sizes."""

    name: str = "tiny"
    family: str = "decoder"  # decoder (the next word; GPT, Llama) | encoder (masked words; BERT) | encoder_decoder (spans; T5)
    num_layers: int = 4
    hidden_size: int = 256
    num_attention_heads: int = 4
    num_query_groups: int | None = None  # key/value heads: None = as many as heads, 1 = multi-query
    head_dim: int | None = None  # None = hidden_size / num_attention_heads
    ffn_hidden_size: int | None = None  # None = 4 hidden (gelu) or 8/3 hidden rounded up to 64 (swiglu)
    decoder_layers: int | None = None  # encoder_decoder: layers of the decoder, beside num_layers of the encoder; None = as many
    token_types: int = 0  # encoder: rows of a table for kinds of text (BERT: 2); 0 = no table
    embedding_norm: bool = False  # encoder: a norm of the embeddings, before the first layer (BERT)
    max_sequence_length: int = 1024  # rows of a learned position table; the limit of generation for both kinds
    position_embedding: str = "rope"  # rope | learned; encoder_decoder: learned | sinusoidal | relative (T5)
    relative_buckets: int = 32  # relative: numbers that a head has for distances, and ...
    relative_distance: int = 128  # ... the distance behind which all is one
    attention_scale: float | None = None  # encoder_decoder: of the scores; None = 1 / sqrt(head_dim)
    embedding_scale: float = 1.0  # encoder_decoder: of the words' vectors, before positions are added
    logit_scale: float = 1.0  # encoder_decoder: of the last norm's output, before the logits
    rotary_percent: float = 1.0
    rotary_base: float = 10000.0
    rotary_interleaved: bool = False
    rope_scaling_factor: float | None = None  # Llama 3.1's frequency-dependent scaling; None = off
    rope_low_freq_factor: float = 1.0  # wavelengths above rope_original_length / this are scaled whole ...
    rope_high_freq_factor: float = 4.0  # ... those below rope_original_length / this not at all, those between in part
    rope_original_length: int = 8192  # tokens of the context before scaling
    position_offset: int = 0  # learned: rows of the table before that of the first token (OPT: 2)
    block: str = "serial"  # serial | parallel (attention beside the MLP, a norm each) | parallel_one_norm (one for both) | post_norm (norms after the sums)
    norm: str = "rmsnorm"  # rmsnorm | layernorm
    norm_eps: float = 1e-5
    activation: str = "swiglu"  # swiglu | geglu | geglu_tanh | gelu | gelu_tanh | relu
    bias: bool = False  # of all linear layers
    qkv_bias: bool = False
    proj_bias: bool = False  # of attention's output
    mlp_bias: bool = False  # of both layers of the MLP
    head_bias: bool = False  # of the logits
    qk_norm: bool = False  # RMSNorm or LayerNorm of each head's queries and keys, before rotation
    tied_embeddings: bool = False
    embedding_size: int | None = None  # width of the word table, projected to and from hidden_size; None = hidden_size
    hidden_dropout: float = 0.0
    attention_dropout: float = 0.0
    init_std: float = 0.02
    vocab_size: int | None = None  # None = the tokenizer's, with the words of the objective: a mask (encoder), sentinels (encoder_decoder)
    vocab_multiple: int = 128  # the table is padded to a multiple of this and of parallel.tp


@dataclass(frozen=True)
class ParallelConfig:
    tp: int = 1  # tensor parallel
    pp: int = 1  # pipeline stages
    vpp: int | None = None  # model chunks a pipeline rank (interleaved 1F1B); None = plain 1F1B
    cp: int = 1  # context parallel: every sequence is split over these ranks
    cp_method: str = "ring"  # how keys and values meet: ring | ulysses (heads divide by cp) | gather (documents of any length)
    sp: bool = False  # sequence parallel: norms and dropouts split over the tensor-parallel ranks
    distributed_optimizer: bool = True
    overlap_grad_reduce: bool = True
    overlap_param_gather: bool = True
    recompute: str = "none"  # none | selective (core attention) | full
    recompute_layers: int = 1  # full: layers in one recomputed block


@dataclass(frozen=True)
class PrecisionConfig:
    dtype: str = "fp32"  # fp32 | bf16 | fp16 (weights and activations; main weights and optimizer are fp32)
    fp8: str | None = None  # scaling of FP8 matrix products in the layers: delayed | current | blockwise | mxfp8; None = off
    fp8_format: str = "hybrid"  # hybrid: e4m3 forward, e5m2 for gradients | e4m3
    fp8_margin: int = 0  # delayed: scales leave this many powers of two free
    fp8_history: int = 1024  # delayed: steps whose largest value decides the scale
    fp8_edge_layers: int = 0  # the first and the last so many layers stay in dtype
    initial_loss_scale: float = 65536.0  # fp16 only
    loss_scale_window: int = 1000
    grad_reduce_in_fp32: bool = True


@dataclass(frozen=True)
class KernelsConfig:
    """Of what layers are made, and which backend serves each op: auto (the best that can here; `doctor` says which), or one by name."""

    layers: str = "auto"  # auto (with precision.fp8 te or fp8, else fused) | fused (ours) | te (Transformer Engine) | fp8 (ours) | plain
    rms_norm: str = "auto"
    layer_norm: str = "auto"
    swiglu: str = "auto"
    geglu: str = "auto"
    bias_gelu: str = "auto"
    rope: str = "auto"
    linear_cross_entropy: str = "auto"
    attention: str = "auto"
    fp8_linear: str = "auto"


@dataclass(frozen=True)
class DataConfig:
    corpus: str = "stdlib"  # what is prepared when no path is given: stdlib (source and documentation) | stdlib-docs (documentation)
    path: str | None = None  # a directory written by `prepare`
    paths: tuple[str, ...] = ()  # several prepared directories, or Megatron .bin/.idx prefixes
    weights: tuple[float, ...] = ()  # of `paths`; empty = by size
    tokenizer: str | None = None  # a Hugging Face tokenizer.json; None = the prepared directory's
    vocab_size: int = 2048  # of a tokenizer that `prepare` trains
    sequence_length: int = 256
    split: tuple[float, ...] = (0.92, 0.04, 0.04)  # train, validation, test: by a hash of each document
    seed: int = 1234  # of the order of samples
    reset_positions: bool = False  # positions start at 0 in each document
    reset_attention: bool = False  # no attention across documents
    masked_share: float = 0.15  # encoder, encoder_decoder: share of the words that are to be found again
    span_length: float = 3.0  # encoder_decoder: words of a span, on average
    mask_eod_loss: bool = False  # no loss where the input is an end-of-document token (megatron-core's eod_mask_loss)
    max_bad_lines: int = 100  # corrupt JSONL lines skipped before preparation refuses
    text_key: str = "text"  # the field of a JSONL object or Parquet row
    workers: int = 0  # tokenisation processes; 0 = one a core
    cache: str = "outputs/data"


@dataclass(frozen=True)
class OptimConfig:
    lr: float = 1e-3
    min_lr: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip: float = 1.0  # global norm of the gradient; 0 = off
    schedule: str = "cosine"  # cosine | linear | wsd | constant
    warmup_steps: int = 100
    decay_steps: int | None = None  # None = train.steps; wsd: length of the final decay, None = a fifth
    wsd_decay: str = "sqrt"  # shape of the final decay of wsd: sqrt (1 - sqrt(t)) | linear


@dataclass(frozen=True)
class TrainConfig:
    steps: int = 1000
    tokens: int | None = None  # token budget: overrides steps
    global_batch_size: int = 32
    micro_batch_size: int = 8
    seed: int = 1234  # initial weights and dropout
    max_bad_steps: int = 5  # non-finite steps in a row before the run stops


@dataclass(frozen=True)
class ValidationConfig:
    every: int = 100  # steps; 0 = never
    samples: int = 256  # sequences of the validation split
    at_end: bool = True


@dataclass(frozen=True)
class StopConfig:
    """Each criterion is off at its default."""

    target_loss: float | None = None  # validation loss (nats a token) at or under which the stage is done
    plateau_patience: int | None = None  # validations without improvement
    plateau_delta: float = 0.0  # improvement that counts, nats
    wall_time: float | None = None  # seconds
    reward_accuracy: float | None = None  # reward: share of held-out pairs in the right order at or above which the stage is done
    calibration_error: float | None = None  # reward: reward_accuracy counts only while the expected calibration error is at most this
    kl_budget: float | None = None  # ppo: KL to the reference, nats a response, above which the stage ends
    reward_per_kl: float | None = None  # ppo: reward gained per nat of KL over the last `window` iterations below which it ends
    length_drift: float | None = None  # ppo: response length over that of the first iterations (or under 1 / this), such as 2.0
    entropy_floor: float | None = None  # ppo: nats a token
    reward_disagreement: float | None = None  # ppo: standard deviation between the reward models of an ensemble, over that at the start
    window: int = 10  # ppo: iterations that the four above look at


@dataclass(frozen=True)
class CheckpointConfig:
    load: str | None = None  # a checkpoint or run directory | auto (this run's newest, else from the start)
    start: str | None = None  # a checkpoint or run directory of an earlier stage: its weights are where this one starts
    average: bool = False  # load, start: the averaged weights of ppo (ppo.ema) instead of the newest ones
    best: bool = False  # also keep the checkpoint with the best validation; a later stage starts from it
    every: int = 0  # steps; 0 = only at the end
    auto: bool = False  # save every sqrt(2 MTTF x write time) by the goodput ledger (docs/goodput.md); until that is known, by `every`
    keep: int = 3  # newest complete checkpoints kept; 0 = all
    background: bool = True  # write while training goes on
    format: str = "fully_reshardable"  # | dp_reshardable: faster, resumes only at the same layout
    save_at_end: bool = True
    weights_only: bool = False  # load: take the weights, start optimizer and data anew


@dataclass(frozen=True)
class LaunchConfig:
    ranks: int = 1
    threads: int = 0  # OMP threads a rank; 0 = cores / ranks
    timeout: float = 600.0  # seconds that a collective may take
    device: str = "auto"  # auto | cpu | cuda
    master_port: int = 0  # 0 = a free one


@dataclass(frozen=True)
class RecoveryConfig:
    """What becomes of a step whose loss or gradient is not finite, or whose loss jumps (docs/faults.md)."""

    skip: tuple[str, ...] = ()  # samples FIRST:LAST, counted from 0 in the order of training, that are left out
    spike_factor: float | None = None  # a loss above this many times the median of the last `window`: back to the newest checkpoint; null = off
    window: int = 50  # steps
    max_rewinds: int = 4  # of a run; beyond, it stops


@dataclass(frozen=True)
class HealthConfig:
    """What is noticed while a job runs: one that hangs, and ranks that are slow."""

    hang_timeout: float | None = 300.0  # seconds without progress after which the job ends and says whom it waits for (at most half of launch.timeout); null = off
    straggler_factor: float | None = 1.5  # a rank that computes this many times as long as its peers is named; null = off
    straggler_window: int = 50  # steps between two such looks


@dataclass(frozen=True)
class LogConfig:
    every: int = 1  # steps between progress lines
    wandb: str = "auto"  # auto (offline where wandb is installed) | disabled | offline | online
    wandb_project: str = "megatron-ext"
    gpu_every: int = 10  # steps between NVML readings of all ranks' GPUs; 0 = off
    report: bool = True  # write report.md and its plots when the stage ends
    prometheus: bool = True  # the newest figures in run.dir/metrics.prom, in Prometheus' text format
    prometheus_dir: str | None = None  # a file there too, readable by all: a directory of node_exporter's textfile collector
    prometheus_listen: str | None = None  # HOST:PORT where rank 0 serves them at /metrics, such as 127.0.0.1:9400; null = nowhere


@dataclass(frozen=True)
class RunConfig:
    dir: str = "outputs/run"
    private: bool = True  # directories that a run makes are its owner's alone (modes 700 and 600); false = as the umask says, for teams
    stages: tuple[str, ...] = ("pretrain", "adapt", "sft", "reward", "ppo")  # of the main job (`run`), in this order


@dataclass(frozen=True)
class GenerateConfig:
    max_tokens: int = 64
    temperature: float = 1.0  # 0 = greedy
    top_k: int = 0  # 0 = off
    top_p: float = 1.0  # 1 = off
    stop: tuple[str, ...] = ()
    seed: int = 1234  # sample i draws from a generator seeded by (seed, i)
    samples: int = 1  # completions a prompt
    batch_size: int = 16


@dataclass(frozen=True)
class EvaluateConfig:
    split: str = "test"  # train | validation | test
    samples: int = 0  # sequences; 0 = the whole split
    batch_size: int = 8
    harness: tuple[str, ...] = ()  # tasks of EleutherAI's lm-evaluation-harness to run instead of a split (docs/evaluate.md)
    task_dir: str | None = None  # harness: a directory with task files (YAML) and their data
    fewshot: int | None = None  # harness: solved examples before each question; null = what the task says
    limit: int | None = None  # harness: documents of each task; null = all
    output: str | None = None  # harness: where results go; null = harness/ in the checkpoint's run directory
    max_length: int | None = None  # harness: tokens that the model sees at once; null = model.max_sequence_length
    add_bos: bool | None = None  # harness: a beginning-of-sequence token before every text; null = what the tokenizer does by itself
    bootstrap: int = 100000  # harness: resamples that a standard error is estimated from; 0 = none
    task_code: bool = False  # harness: let files of task_dir run Python (!function and the like); the same as running a program of theirs


@dataclass(frozen=True)
class ScalingConfig:
    """`plan scaling`: the loss of the configured run, predicted from small runs (docs/scaling.md)."""

    runs: tuple[str, ...] = ()  # run directories, or folders of them
    law: str = "auto"  # auto (by what the runs vary) | chinchilla (size and tokens) | power (compute)
    noise: float = 0.005  # least relative spread of the losses of runs that differ in their seed alone
    level: float = 0.9  # of the intervals
    resamples: int = 200  # fits that the intervals are made of
    output: str | None = None  # where page and plot go; null = prediction/ in the first of runs


@dataclass(frozen=True)
class ChatConfig:
    """Instructions (sft), preferences (reward, dpo) and prompts (ppo, grpo, rloo)."""

    path: str | None = None  # a file or directory of .jsonl, .json, .csv (each also .gz); null = tasks from the standard library
    validation: str | None = None  # held-out records; null = a share of `path`
    validation_share: float = 0.1  # of `path`, by a hash of the prompt
    format: str = "auto"  # auto | prompt_response | messages | alpaca | sharegpt | preference | ranking | prompts
    prompt_key: str = "prompt"  # columns of prompt_response, preference, ranking and prompts
    response_key: str = "response"
    system: str | None = None  # a system message put before every conversation that has none
    template: str | None = None  # a Jinja chat template, or a tokenizer_config.json that holds one; null = ours
    max_length: int | None = None  # tokens of an example; null = data.sequence_length
    overlong: str = "skip"  # what becomes of longer examples: skip | truncate (a prompt from the left, a response from the right)
    packing: bool = True  # several examples in a sequence, which do not see each other
    max_bad_records: int = 100  # broken records skipped before the stage refuses


@dataclass(frozen=True)
class CollectConfig:
    """`collect`: data for SFT and the reward stage, and the page on which people order answers (docs/collect.md). Sampling is `generate`'s, columns are `chat`'s."""

    builder: str = "auto"  # build: auto | qa | articles | faq | sections | passages | few_shot | tasks
    domain: str | None = None  # build: of records that name none
    source: str | None = None  # build: what rows without an id are called (NAME:LINE); null = their file
    licence: str | None = None  # build: of records that name none
    phrases: str | None = None  # build: YAML of questions for articles and sections; null = conf/collect/phrases.yaml
    min_chars: int = 2  # of an answer
    max_chars: int = 2000  # of a passage, a question, an answer
    passage_chars: int = 100  # build: least of a passage
    max_answers: int = 6  # build: of a task; at most 9, as there are digit keys
    shots: int = 0  # solved examples before each question; augment: 0 = as the template says
    examples: str | None = None  # augment: records that solved examples are taken from; null = the template's own
    template: str = "qa_ko"  # augment: a name in conf/collect, or a .yaml file
    endpoint: str | None = None  # augment: an OpenAI-compatible address, such as http://127.0.0.1:8000/v1; null = checkpoint.load replies
    model: str | None = None  # augment: as the endpoint calls it
    key_env: str = "OPENAI_API_KEY"  # augment: the environment variable that holds the endpoint's key; empty = none
    concurrency: int = 8  # augment: requests under way
    timeout: float = 120.0  # augment: seconds in which a reply has to come whole
    retries: int = 5  # augment: of a request
    max_requests: int | None = None  # augment: budget of a directory, over all runs ...
    max_tokens: int | None = None  # ... of prompts and replies together
    max_cost: float | None = None  # ... in the currency of the prices
    price_in: float = 0.0  # of a million tokens of prompts
    price_out: float = 0.0  # of a million tokens of replies
    keep_cut: bool = False  # augment: keep answers that ended at max_tokens
    grounded: float = 0.0  # augment: least share of an answer's words that its passage must hold; 0 = off
    annotators: tuple[str, ...] = ()  # serve: who orders answers; each gets a link with a token
    renew: tuple[str, ...] = ()  # serve: whose token is made anew; the old link ends
    host: str = "127.0.0.1"  # serve: address that the page listens at; it speaks plain HTTP
    port: int = 8600  # serve: 0 = a free one
    choose: str = "order"  # serve: order (all answers) | best (the best is enough, the others tie)
    votes: int = 1  # serve: people that order a task
    shared: float = 0.1  # serve: share of tasks that `shared_votes` people order, so that agreement is known
    shared_votes: int = 2
    lease: float = 1800.0  # serve: seconds that a task on one person's screen is kept from others
    target: int = 50000  # records in all
    domain_target: int = 10000  # records of a domain
    targets: tuple[str, ...] = ()  # of single domains: DOMAIN:NUMBER
    merge: str = "mean"  # export: mean (several people's orders become one) | each
    format: str = "ranking"  # export: ranking | preference (pairs) | sft (the best answers)


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters on the linear layers (Hu et al. 2021, arXiv 2106.09685); the base weights do not change."""

    rank: int = 0  # 0 = off
    alpha: float = 16.0  # the product of the two matrices is scaled by alpha / rank
    targets: tuple[str, ...] = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")


@dataclass(frozen=True)
class RankingConfig:
    """The reward stage."""

    margin: float = 0.0  # the better one's reward has to lead by; a record's own `margin` goes before
    demonstrations_to_zero: bool = True  # afterwards a bias, so that demonstrations score 0 on average


@dataclass(frozen=True)
class RewardsConfig:
    """What a response is worth to ppo, grpo and rloo: reward models and functions, weighted and added."""

    models: tuple[str, ...] = ()  # checkpoints of the reward stage; several are an ensemble (their mean)
    model_weight: float = 1.0
    functions: tuple[str, ...] = ()  # length, format, exact_match, overlap, repetition, code, or module:function; NAME:SETTING=VALUE (docs/rewards.md)
    weights: tuple[float, ...] = ()  # of `functions`; empty = 1 each
    timeout: float = 10.0  # seconds that a function may take for one response
    clip: float | None = None  # rewards outside [-clip, clip] are clipped
    missing_eos: float | None = None  # reward of a response that does not end by itself; null = no difference


@dataclass(frozen=True)
class RolloutConfig:
    """What is generated for each iteration of ppo, grpo and rloo; sampling is `generate`'s."""

    prompts: int = 32  # of an iteration, over all ranks
    samples: int = 1  # responses to each prompt
    max_prompt: int | None = None  # tokens; longer prompts are skipped and counted; null = what leaves room for generate.max_tokens
    batch_tokens: int = 8192  # tokens of a micro-batch of scoring and training
    logprob_bound: float | None = None  # largest |train - generate| logprob; null = by precision (docs/rlhf.md); above it the run stops


@dataclass(frozen=True)
class PpoConfig:
    """Schulman et al. 2017 (arXiv 1707.06347) as used by InstructGPT (arXiv 2203.02155); grpo and rloo read what applies."""

    advantage: str | None = None  # gae | grpo | rloo | reinforce; null = the stage's
    policy_loss: str | None = None  # clip | reinforce | gspo | cispo; null = the stage's
    epochs: int = 1  # passes over the rollouts of an iteration
    minibatches: int = 1  # optimizer steps a pass
    clip: float = 0.2
    clip_high: float | None = None  # the upper one where it differs
    value_clip: float | None = 0.2  # null = no clipping of the value loss
    value_coef: float = 1.0  # of the value loss, which trains the critic alone
    entropy_coef: float = 0.0
    gamma: float = 1.0
    lam: float = 0.95
    whiten: bool = True  # advantages to mean 0 and variance 1, over the global batch
    kl: str = "k1"  # estimator of the per-token KL: k1 | k2 | k3
    kl_in: str = "reward"  # reward | loss
    kl_coef: float = 0.02
    kl_target: float | None = None  # nats a response: the coefficient adapts towards it; null = fixed
    kl_horizon: float = 10000.0  # episodes, of the adaptive controller
    ptx_coef: float = 0.0  # of the pretraining loss, added to the policy's gradient (InstructGPT: 27.8); 0 = off
    ptx_samples: int | None = None  # sequences of `data` an optimizer step; null = as many as episodes
    ema: float | None = None  # decay of the averaged policy that is kept beside (InstructGPT: 0.992); null = off
    offload: bool = False  # models that are not in use wait in host memory
    beta: float = 0.1  # dpo: how strongly the policy is held to the reference
    label_smoothing: float = 0.0  # dpo: share of preferences taken to be wrong
    evaluate_prompts: int = 64  # held-out prompts answered and scored at each validation


@dataclass(frozen=True)
class CriticConfig:
    """The value function of ppo: a model of its own, with its optimizer."""

    load: str | None = None  # a checkpoint; null = the first of rewards.models
    lr: float = 9e-6
    min_lr: float = 9e-7
    warmup_steps: int = 0
    pretrain: int = 0  # iterations in which only the critic learns


@dataclass(frozen=True)
class PlacementConfig:
    """The layout of a model beside the policy, on the same ranks. null = as the policy's."""

    tp: int | None = None
    pp: int | None = None
    sp: bool | None = None


@dataclass(frozen=True)
class ClusterConfig:
    """What `submit` asks Slurm for. null = the site's default."""

    nodes: int = 1
    min_nodes: int | None = None  # the job may start, and restart, on this many of `nodes`: data parallelism shrinks, the global batch stays
    gpus_per_node: int = 0  # 0 = a cluster without GPUs
    gpu_type: str | None = None  # such as h100: --gpus-per-node=h100:8
    tasks_per_node: int | None = None  # ranks a node; null = one a GPU, one without GPUs
    cpus_per_task: int = 1  # cores of a rank; its threads unless launch.threads says otherwise
    memory: str | None = None  # of a node, such as 200G; 0 = all of it
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    time: str = "01:00:00"  # limit of one life: minutes, hours:minutes:seconds or days-hours[:minutes[:seconds]]
    constraint: str | None = None  # features that nodes must have
    exclude: str | None = None  # nodes never to use, such as n[3,17]
    reservation: str | None = None
    exclusive: bool = False  # share nodes with no other job
    options: tuple[str, ...] = ()  # more options of sbatch, such as [--switches=1,--licenses=scratch]
    name: str | None = None  # of the job; null = the stage's
    comment: str | None = None
    launcher: str = "srun"  # srun (a task a rank) | torchrun (a task a node, which starts its ranks)
    container: str = "none"  # none | pyxis (enroot) | apptainer
    image: str | None = None  # of the container: a registry's name or a file
    mounts: tuple[str, ...] = ()  # SOURCE[:TARGET[:ro]]; the working directory and run.dir are mounted anyway
    python: str | None = None  # on the nodes; null = this one (in a container: python)
    modules: tuple[str, ...] = ()  # environment modules to load
    source: tuple[str, ...] = ()  # shell files to source before, such as /opt/env.sh
    env: tuple[str, ...] = ()  # NAME=VALUE, such as NCCL_SOCKET_IFNAME=ib0; never secrets: export those, sbatch passes the environment on
    signal_lead: int = 300  # seconds before the time limit at which ranks are told to save and stop
    requeue: bool = True  # an unfinished job queues again by itself, as does one whose node failed
    max_restarts: int = 100  # lives after the first
    requeue_on_failure: bool = True  # also after a crash (bad input, exit code 2, never)
    max_failures: int = 3  # crashes in a row without a new checkpoint after which it is left alone
    node_check: bool = False  # look at every node first (slurm/node_check); the job queues again without one that falls short
    array_limit: int | None = None  # points of a sweep that run at once; null = all
    cross_node_tp: bool = False  # let tensor-parallel groups reach over nodes, which is slow


@dataclass(frozen=True)
class HardwareConfig:
    """The GPU that is planned for, and how GPUs are joined (conf/hardware; dense peaks with fp32 accumulation, speeds in one direction)."""

    name: str | None = None  # null = unknown: no MFU, no step time, and nothing is refused for its memory
    device: str | None = None  # as torch reports it
    memory: float | None = None  # GiB that torch reports
    bf16: float | None = None  # TFLOP/s
    fp8: float | None = None  # TFLOP/s; null = none
    bandwidth: float | None = None  # of its memory, TB/s
    nvlink: float | None = None  # GB/s of a GPU to the others of its domain
    domain: int = 8  # GPUs that NVLink joins: a node's, or a rack's
    network: float | None = None  # GB/s of a GPU to other nodes
    power: float | None = None  # W, at most


@dataclass(frozen=True)
class PlanConfig:
    """What `plan` counts with beside the run's own keys."""

    margin: float = 0.06  # share of a GPU's memory left to the CUDA context, NCCL and fragmentation
    availability: float = 0.9  # share of the wall time in which steps are made (failures, restarts, checkpoints)
    price: float | None = None  # of a GPU-hour, in any currency; null = no cost
    power_price: float | None = None  # of a kWh
    pue: float = 1.25  # energy of the whole site over that of its computers
    draw: float = 0.85  # share of its power that a busy GPU draws
    server: float = 1.3  # energy of a computer over that of its GPUs
    token_bytes: int = 4  # of a token on disk
    text_bytes: float = 4.5  # of a token's text on disk
    mttf: float | None = None  # hours between failures of the whole job; null = from mttf_gpu
    mttf_gpu: float = 50000.0  # hours between failures of one GPU's share of the machine (Llama 3: 419 in 54 days of 16,384 GPUs)
    calibration: str | None = None  # a file written by `plan calibrate`; null = the one that is shipped
    shown: int = 10  # layouts that `plan search` lists
    stages: tuple[str, ...] = ("base:2.7e11:60", "adapt:2e10:14", "sft:1e9:7:4", "ppo:2e8:14:4")  # `plan acquire`: NAME:TOKENS:DAYS[:COPIES], one after the other


@dataclass(frozen=True)
class Config:
    stage: StageConfig = field(default_factory=StageConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    kernels: KernelsConfig = field(default_factory=KernelsConfig)
    data: DataConfig = field(default_factory=DataConfig)
    curate: CurateConfig = field(default_factory=CurateConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    stop: StopConfig = field(default_factory=StopConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    hardware: HardwareConfig = field(default_factory=HardwareConfig)
    plan: PlanConfig = field(default_factory=PlanConfig)
    recovery: RecoveryConfig = field(default_factory=RecoveryConfig)
    health: HealthConfig = field(default_factory=HealthConfig)
    log: LogConfig = field(default_factory=LogConfig)
    run: RunConfig = field(default_factory=RunConfig)
    generate: GenerateConfig = field(default_factory=GenerateConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    scaling: ScalingConfig = field(default_factory=ScalingConfig)
    chat: ChatConfig = field(default_factory=ChatConfig)
    collect: CollectConfig = field(default_factory=CollectConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    ranking: RankingConfig = field(default_factory=RankingConfig)
    rewards: RewardsConfig = field(default_factory=RewardsConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    ppo: PpoConfig = field(default_factory=PpoConfig)
    critic: CriticConfig = field(default_factory=CriticConfig)
    reference_layout: PlacementConfig = field(default_factory=PlacementConfig)
    reward_layout: PlacementConfig = field(default_factory=PlacementConfig)
    critic_layout: PlacementConfig = field(default_factory=PlacementConfig)
    rollout_layout: PlacementConfig = field(default_factory=PlacementConfig)
    hf: str | None = None  # convert: a Hugging Face directory to read
    megatron: str | None = None  # convert: a checkpoint of Megatron-LM (torch_dist) to read
    adapter: str | None = None  # convert: with hf, a PEFT directory of a LoRA adapter that lies on it; with checkpoint.load, only: its adapter alone is written
    input: str | None = None  # prepare: text to read, with curate.steps any files; collect: documents, records, or a directory of collected data
    output: str | None = None  # prepare, convert, collect: directory to write
