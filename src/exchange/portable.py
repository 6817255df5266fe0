"""A policy for runtimes without Python: ONNX, torch.export."""

import time
from pathlib import Path

import numpy as np

from errors import UserError

TOLERANCE = 1e-4  # of the largest difference from the policy, in normalised actions

SMOOTHING = ("blend_steps", "temporal_ensemble_coeff")  # how the policy itself goes over from chunk to chunk


INT8_TOLERANCE = 0.1  # the same of --int8


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
    from processors.pipelines import resize_of

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
