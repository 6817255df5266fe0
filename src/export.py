"""Take a checkpoint elsewhere: to lerobot-train, or to a runtime without Python.

    python src/export.py outputs/my_run/checkpoint-5000 outputs/lerobot_run --format lerobot
    python src/export.py outputs/my_run/checkpoint-5000 my_policy.onnx --format onnx       # or torchscript, torch-export

The exported network maps the preprocessed observations to the normalised chunk of actions; beside it lies a .json with the names and
shapes of its inputs, and the numbers that normalise before and after it. It is run and compared with the policy before it counts.
Going over smoothly from one chunk to the next (flow's blend_steps, act's temporal ensembling) is left to the program that runs it.
"""

import json
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

from checkpoint import OWN_WEIGHTS, TrainState, load_optimizer, read_json, step_of
from command_line import OneLineParser, command
from config import FIELDS, TrainConfig, UserError, one_line

TOLERANCE = 1e-4  # of the largest difference from the policy, in normalised actions
SMOOTHING = ("blend_steps", "temporal_ensemble_coeff")  # how the policy itself goes over from chunk to chunk
INT8_TOLERANCE = 0.1  # the same of --int8
FORMATS = ("lerobot", "onnx", "torchscript", "torch-export")


def to_lerobot(checkpoint: Path, output: Path) -> Path:
    """A checkpoint-<step> as `output`/checkpoints/<step>, which `lerobot-train --resume=true` continues.

    Raises:
        UserError: `output` is there already, or the checkpoint holds what LeRobot has no place for.
    """
    import torch
    from lerobot.common.train_utils import get_step_checkpoint_dir, save_checkpoint, update_last_checkpoint

    from optim import make_schedule
    from policy import build_policy, load_policy_config
    from processors import load_processors, resize_of
    from world import World

    if output.exists():
        raise UserError(f"{output} is there already: choose another folder or remove it")
    if (checkpoint / OWN_WEIGHTS).exists():
        print(
            f"note: {checkpoint.name} has averaged weights (--ema_decay): LeRobot goes on from the average",
            file=sys.stderr,
        )
    state = TrainState(*(read_json(checkpoint / f"{name}.json") for name in ("trainer_state", "train_config")), {})
    config = TrainConfig(**{name: value for name, value in state.train_config.items() if name in FIELDS})
    policy_config, processors = load_policy_config(checkpoint, None, "cpu"), load_processors(checkpoint, "cpu")
    size = resize_of(processors[0])
    for refused, why in (
        (len(config.dataset_id) > 1, "several datasets"),
        (policy_config.use_peft, "adapters"),
        (
            size and policy_config.observation_delta_indices,
            "pictures resized and a history, which LeRobot's step does not go with",
        ),
        (config.freeze, "frozen weights"),
    ):
        if refused:
            raise UserError(f"{checkpoint.name} was trained with {why}: lerobot-train cannot resume it")
    policy = build_policy(policy_config, None, checkpoint)
    step, theirs = (
        step_of(checkpoint) or state.trainer_state["step"],
        their_config(config, state, policy_config, output),
    )
    optimizer = theirs.optimizer.build(policy.get_optim_params())
    load_optimizer(checkpoint, World("cpu"), policy, optimizer)
    scheduler = theirs.scheduler.build(optimizer, config.steps) if theirs.scheduler else None
    if scheduler is not None:  # where its own stepping would have brought it
        factor = make_schedule(policy, config)
        scheduler.last_epoch, scheduler._step_count = step, step + 1
        scheduler._last_lr = [peak * factor(step) for peak in scheduler.base_lrs]
        for group, lr in zip(optimizer.param_groups, scheduler._last_lr, strict=True):
            group["lr"] = lr
    torch.manual_seed(config.seed)
    folder = get_step_checkpoint_dir(output, config.steps, step)
    save_checkpoint(
        folder, step, theirs, policy, optimizer, scheduler, *processors, num_processes=1, batch_size=config.batch_size
    )
    update_last_checkpoint(folder)
    return folder


def their_config(config: TrainConfig, state: TrainState, policy_config, output: Path):
    """LeRobot's TrainPipelineConfig for a run of ours."""
    from lerobot.configs.default import DatasetConfig
    from lerobot.configs.train import TrainPipelineConfig
    from lerobot.transforms import ImageTransformsConfig

    from build import build_source
    from processors import parse_rename
    from validation import split

    name, source = config.dataset_id[0], build_source(config)
    root = str(Path(name).expanduser().resolve()) if Path(name).expanduser().is_dir() else config.dataset_root
    kept = [source.episodes[i] for i in split(source, config, state)[0]]  # LeRobot holds out the last ones, if any
    return TrainPipelineConfig(
        dataset=DatasetConfig(
            repo_id="/".join(Path(name).parts[-2:]) if root else name,
            root=root,
            episodes=kept if len(kept) < source.meta.total_episodes else None,
            revision=config.revision,
            use_imagenet_stats=config.imagenet_stats == "on",
            image_transforms=ImageTransformsConfig(enable=bool(config.augment)),
        ),
        policy=policy_config,
        rename_map=parse_rename(config.rename),
        output_dir=output,
        job_name=f"armature_{policy_config.type}",
        seed=config.seed,
        batch_size=config.batch_size,
        steps=config.steps,
        log_freq=config.log_freq,
        save_freq=config.save_freq or config.steps,
        **own_optimizer(policy_config, config),
    )


def own_optimizer(policy_config, config: TrainConfig) -> dict:
    """LeRobot's settings for a run whose schedule is not the policy's own."""
    if config.lr_schedule is None and config.warmup_steps is None and config.grad_clip_norm is None:
        return {"optimizer": policy_config.get_optimizer_preset(), "scheduler": policy_config.get_scheduler_preset()}
    from lerobot.optim import DiffuserSchedulerConfig

    from optim import preset_schedule

    optimizer = policy_config.get_optimizer_preset()
    given = {name: getattr(config, name) for name in ("lr", "weight_decay", "grad_clip_norm")}
    optimizer = replace(optimizer, **{name: value for name, value in given.items() if value is not None})
    scheduler, warmup = preset_schedule(policy_config, config), config.warmup_steps or 0
    if scheduler is None:
        name = config.lr_schedule or "constant"
        name = "constant_with_warmup" if name == "constant" and warmup else name  # its constant has none
        scheduler = DiffuserSchedulerConfig(name=name, num_warmup_steps=warmup)
    return {"use_policy_training_preset": False, "optimizer": optimizer, "scheduler": scheduler}


def make_core(policy):
    """The policy's network as a module from tensors to a chunk: (observations in order, [noise]) -> (1, T, A), and its inputs.

    Raises:
        UserError: this policy cannot be cut out of its Python.
    """
    import torch
    from torch import nn

    config = policy.config
    names = list(config.input_features)
    example = [torch.rand(1, *config.input_features[name].shape) for name in names]
    if (
        config.type not in ("act", "flow")
        or getattr(config, "n_obs_steps", 1) != 1
        or getattr(config, "task_embedding", False)
    ):
        raise UserError(
            f"policy {config.type} with these settings does not export: act, and flow of one observation, do"
        )
    if config.type == "flow":
        names, example = [*names, "noise"], [*example, torch.randn(1, *config.noise_shape)]

    class Core(nn.Module):
        def __init__(self):
            super().__init__()
            self.policy = policy

        def forward(self, *inputs):
            batch = dict(zip(names, inputs, strict=True))
            if config.type == "flow":
                return self.policy.denoise(self.policy.encoder(batch), batch["noise"])
            if config.image_features:
                batch["observation.images"] = [batch[key] for key in config.image_features]
            return self.policy.model(batch)[0]

    return Core().eval(), names, example


def export(policy, path: Path, kind: str):
    """Write `path`; returns a function from numpy inputs in order to the chunk, as the written file computes it, and the inputs.

    Raises:
        UserError: the policy does not export, or what it needs is not installed.
    """
    import torch

    core, names, example = make_core(policy)
    with torch.no_grad():
        if kind == "torchscript":
            torch.jit.trace(core, tuple(example), check_trace=False).save(str(path))
            loaded = torch.jit.load(str(path))
        elif kind == "torch-export":
            torch.export.save(torch.export.export(core, tuple(example)), str(path))
            loaded = torch.export.load(str(path)).module()
        else:
            return to_onnx(core, tuple(example), path, names), core, names, example

    def run(*inputs):
        with torch.no_grad():
            return loaded(*map(torch.from_numpy, inputs)).numpy()

    return run, core, names, example


def to_onnx(core, example: tuple, path: Path, names: list[str]):
    try:
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401  (torch's exporter is built on it)
    except ImportError as error:
        raise UserError(f"--format onnx needs {error.name}: uv pip install onnx onnxruntime onnxscript") from error
    import torch

    spelt = [name.replace(".", "_") for name in names]  # ONNX readers trip over dots
    torch.onnx.export(
        core,
        example,
        str(path),
        input_names=spelt,
        output_names=["chunk"],
        dynamo=True,
        external_data=False,
        verbose=False,
    )
    return onnx_runner(path)


def onnx_runner(path: Path):
    """A function from numpy inputs in order to the chunk, as onnxruntime computes the file."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [put.name for put in session.get_inputs()]
    return lambda *inputs: session.run(None, dict(zip(names, inputs, strict=True)))[0]


def check(run, core, example, runs: int = 20) -> tuple[float, float, float]:
    """Largest difference from the policy over random inputs, and milliseconds of the export and of the policy (medians)."""
    import torch

    worst, times = 0.0, ([], [])
    for _ in range(runs):
        inputs = [torch.rand_like(tensor) for tensor in example]
        begun = time.perf_counter()
        mine = run(*(tensor.numpy() for tensor in inputs))
        between = time.perf_counter()
        with torch.no_grad():
            theirs = core(*inputs).numpy()
        times[0].append(between - begun)
        times[1].append(time.perf_counter() - between)
        worst = max(worst, float(np.abs(mine - theirs).max()))
    return worst, *(1000 * float(np.median(t)) for t in times)


def normalisation(pipeline) -> dict:
    """{feature: {mode, mean, std, ...}} of a pipeline's (un)normaliser, as plain lists."""
    found = {}
    for step in pipeline.steps:
        if hasattr(step, "norm_map"):
            for key, feature in step.features.items():
                mode = step.norm_map.get(feature.type)
                stats = step.stats.get(key) or {}
                found[key] = {"mode": getattr(mode, "value", "IDENTITY")}
                found[key] |= {name: np.asarray(value).tolist() for name, value in stats.items() if name != "count"}
    return found


def describe(loaded, form: str, names, example, worst: float) -> dict:
    """What a program needs to know to use the exported file."""
    from processors import resize_of

    config, onnx = loaded.policy.config, form == "onnx"
    return {
        "policy": config.type,
        "inputs": {n.replace(".", "_") if onnx else n: list(t.shape) for n, t in zip(names, example, strict=True)},
        "output": {"chunk": [1, config.chunk_size, config.action_feature.shape[0]]},
        "n_action_steps": config.n_action_steps,
        **{name: getattr(config, name) for name in SMOOTHING if hasattr(config, name)},
        "image_size": resize_of(loaded.preprocess),
        "normalise": normalisation(loaded.preprocess),
        "unnormalise": normalisation(loaded.postprocess),
        "largest_difference": worst,
    }


@command
def main(argv: list[str]) -> int:
    parser = OneLineParser(prog="export.py", description="Take a checkpoint elsewhere.")
    parser.add_argument("checkpoint", help="a checkpoint-<step> folder, or any LeRobot policy folder or Hub id")
    parser.add_argument("output", type=Path, help="a new folder for lerobot, else the file to write")
    parser.add_argument("--format", choices=FORMATS, required=True)
    parser.add_argument(
        "--int8",
        action="store_true",
        help=f"with onnx: weights in 8 bits, written if they are off by {INT8_TOLERANCE:g} at most",
    )
    args = parser.parse_args(argv)
    try:
        if args.format == "lerobot":
            folder = to_lerobot(Path(args.checkpoint), args.output)
            print(
                f"{folder}\nnext: lerobot-train --resume=true --config_path={folder}/pretrained_model/train_config.json"
            )
        else:
            write(args)
    except OSError as error:
        raise UserError(f"{args.output} cannot be written: {one_line(error)}") from error
    return 0


def write(args) -> None:
    from infer import load_policy
    from policy import quiet_lerobot

    about = args.output.parent / f"{args.output.name}.json"
    for path in (args.output, about):
        if path.exists():
            raise UserError(f"{path} is there already: choose another name or remove it")
    if args.int8 and args.format != "onnx":
        raise UserError("--int8 goes with --format onnx")
    loaded = load_policy(args.checkpoint, device="cpu")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    fresh = args.output.with_name(f".{args.output.name}.tmp")
    try:
        with quiet_lerobot():  # and onnx's own remarks
            run, core, names, example = export(loaded.policy, fresh, args.format)
        worst, mine, theirs = check(run, core, example)
        require(worst, TOLERANCE, args.format)
        if args.int8:
            with quiet_lerobot():
                run = quantised(fresh)
            worst, mine, theirs = check(run, core, example)
            require(worst, INT8_TOLERANCE, "--int8")
        fresh.replace(args.output)
    except (RuntimeError, OSError) as error:
        raise UserError(
            f"--format {args.format}: {args.checkpoint} does not export: {one_line(error)[:200]}"
        ) from error
    finally:
        fresh.unlink(missing_ok=True)
    about.write_text(json.dumps(describe(loaded, args.format, names, example, worst), indent=2) + "\n")
    print(f"{args.output}: {args.output.stat().st_size / 1e6:.1f} MB, inputs and normalisation in {about.name}")
    print(f"largest difference from the policy {worst:.1g}; a chunk takes {mine:.1f} ms, of the policy {theirs:.1f} ms")


def require(worst: float, allowed: float, what: str) -> None:
    if not worst <= allowed:  # nan as well
        raise UserError(
            f"{what}: the export differs from the policy by {worst:.2g}, allowed is {allowed:g}: not written"
        )


def turn_weights(graph) -> None:
    """Turn the weights of linear layers round, once for all their uses: the quantiser turns them at each, and flow's head has two."""
    from onnx import numpy_helper

    weights, turned = {tensor.name: tensor for tensor in graph.initializer}, {}
    for node in graph.node:
        how = next((entry for entry in node.attribute if entry.name == "transB"), None)
        if node.op_type == "Gemm" and how is not None and how.i and node.input[1] in weights:
            how.i, turned[node.input[1]] = 0, weights[node.input[1]]
    for name, weight in turned.items():
        weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight).T.copy(), name))
    same = {node.output[0]: node for node in graph.node if node.op_type == "Transpose" and node.input[0] in turned}
    for node in graph.node:
        node.input[:] = [same[name].input[0] if name in same else name for name in node.input]
    for node in same.values():
        graph.node.remove(node)


def quantised(path: Path):
    """The ONNX file with its weights in 8 bits, in its place; a runner of it."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    smaller = path.with_name(f"{path.name}.int8")
    model = onnx.load(str(path))
    turn_weights(model.graph)
    del model.graph.value_info[:]  # the exporter's shapes, of weights that are turned round on the way
    # left as they are: what is no weight, such as flow's coordinates, and the last layer, which is small
    flat = {tensor.name for tensor in model.graph.initializer if len(tensor.dims) < 2}
    layers = [node for node in model.graph.node if node.op_type in ("MatMul", "Gemm")]
    left = [node.name for node in layers if node.input[1] in flat or "action" in node.input[1]]
    kinds = {"op_types_to_quantize": ["MatMul", "Gemm"], "extra_options": {"DefaultTensorType": onnx.TensorProto.FLOAT}}
    quantize_dynamic(model, str(smaller), weight_type=QuantType.QInt8, per_channel=True, nodes_to_exclude=left, **kinds)
    smaller.replace(path)
    return onnx_runner(path)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
