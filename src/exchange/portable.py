"""A policy for runtimes without Python: its network as an ONNX or torch.export file, with a JSON file that describes it.

The network maps preprocessed observations to a chunk of normalised actions. B is 1, T steps of a chunk, A joints.
"""

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from errors import UserError, first_of
from policy.quiet import quiet_lerobot
from processors.padding import padding_of
from processors.pipelines import name_before_rename, resize_of

# The largest difference from the policy that is accepted, in normalised actions.
TOLERANCE = 1e-4
INT8_TOLERANCE = 0.1
# Settings by which a policy blends one chunk into the next, which is left to the program that runs the network.
SMOOTHING = ("blend_steps", "temporal_ensemble_coeff")


class Core(nn.Module):
    """The network of act, or of flow with one observation, as a function of tensors. Of several tasks it does one."""

    def __init__(self, policy, task: str):
        super().__init__()
        self.policy = policy
        self.names = list(policy.config.input_features)
        words = None
        if policy.config.type == "flow":
            self.names.append("noise")
            if policy.config.reads_words:
                with torch.no_grad():
                    words = policy.encoder.words(task)
        self.register_buffer("words", words)  # (1, E)

    def example(self) -> tuple[Tensor, ...]:
        """A random tensor for each input."""
        config = self.policy.config
        inputs = [torch.rand(1, *feature.shape) for feature in config.input_features.values()]
        if config.type == "flow":
            inputs.append(torch.randn(1, *config.noise_shape))
        return tuple(inputs)

    def forward(self, *inputs: Tensor) -> Tensor:
        """Observations of (1, D) or (1, C, H, W), and for flow (1, N, T, A) noise for N draws, to the (1, T, A) chunk."""
        config = self.policy.config
        batch = dict(zip(self.names, inputs, strict=True))
        if config.type == "flow":
            return self.policy.denoise(self.policy.encoder.encode(batch, self.words), batch["noise"])
        if config.image_features:
            batch["observation.images"] = [batch[key] for key in config.image_features]
        chunk, _ = self.policy.model(batch)
        return chunk


@dataclass
class Exported:
    """A written network, with what it is compared to.

    Attributes:
        run: computes the (1, T, A) chunk by the written file, from numpy arrays in the order of `names`.
        core: the same network in PyTorch.
        names: the inputs, as the file calls them.
        example: a tensor for each input.
    """

    run: Callable[..., np.ndarray]
    core: Core
    names: list[str]
    example: tuple[Tensor, ...]


@dataclass
class Comparison:
    """Largest difference between normalised actions of the written file and the policy, and median times for a chunk."""

    difference: float
    export_ms: float
    policy_ms: float


def write_network(loaded, output: Path, file_format: str, int8: bool = False) -> Comparison:
    """Write the network of a policy to `output` and its description to `output`.json, once it agrees with the policy.

    Args:
        loaded: LoadedPolicy, on the CPU.
        file_format: "onnx" or "torch-export".
        int8: store the weights of an ONNX file in 8 bits.

    Raises:
        UserError: a file exists, the policy does not export, a package is missing, or the network differs from the policy.
        OSError: the files cannot be written.
    """
    description = output.with_name(f"{output.name}.json")
    for path in (output, description):
        if path.exists():
            raise UserError(f"{path} exists already. Choose another name, or remove it")
    output.parent.mkdir(parents=True, exist_ok=True)
    unfinished = output.with_name(f".{output.name}.tmp")
    try:
        with quiet_lerobot():  # the exporters print too
            exported = export(loaded, unfinished, file_format)
        comparison = compare(exported, TOLERANCE, f"--format {file_format}")
        if int8:
            with quiet_lerobot():
                exported.run = quantize(unfinished)
            comparison = compare(exported, INT8_TOLERANCE, "--int8")
        unfinished.replace(output)
    finally:
        unfinished.unlink(missing_ok=True)
    description.write_text(json.dumps(describe(loaded, exported, comparison), indent=2) + "\n")
    return comparison


def export(loaded, path: Path, file_format: str) -> Exported:
    """Write the network of a LoadedPolicy to `path`.

    Raises:
        UserError: the policy does not export, its task is not given, or a package is missing.
    """
    config = loaded.policy.config
    if (
        config.type not in ("act", "flow")
        or getattr(config, "n_obs_steps", 1) != 1
        or getattr(config, "task_embedding", False)
    ):
        raise UserError(
            f"policy {config.type} does not export with these settings: expected act, or flow with n_obs_steps=1 and "
            "without task_embedding. Run it with src/serve.py instead"
        )
    if padding_of(loaded.preprocess) is not None:
        raise UserError(
            "a policy trained with --pad_datasets does not export. Run it with src/serve.py --trained_on instead"
        )
    if getattr(config, "reads_words", False) and not loaded.task:
        raise UserError(
            f"the policy does several tasks, and an exported network does one. Add --task TEXT, one of {first_of(config.tasks)}"
        )
    core = Core(loaded.policy, loaded.task).eval()
    example = core.example()
    with torch.no_grad():
        if file_format == "onnx":
            names = [name.replace(".", "_") for name in core.names]  # programs that read ONNX trip over dots
            write_onnx(core, example, path, names)
            return Exported(onnx_runner(path), core, names, example)
        torch.export.save(torch.export.export(core, example), str(path))
    module = torch.export.load(str(path)).module()

    def run(*inputs: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return module(*(torch.from_numpy(array) for array in inputs)).numpy()

    return Exported(run, core, core.names, example)


def write_onnx(core: Core, example: tuple[Tensor, ...], path: Path, names: list[str]) -> None:
    try:
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401  (torch's exporter is built on it)
    except ImportError as error:
        raise UserError(
            f"--format onnx needs {error.name}. Run `uv pip install onnx onnxruntime onnxscript`"
        ) from error
    torch.onnx.export(
        core,
        example,
        str(path),
        input_names=names,
        output_names=["chunk"],
        dynamo=True,
        external_data=False,
        verbose=False,
    )


def onnx_runner(path: Path) -> Callable[..., np.ndarray]:
    """A function from numpy inputs in order to the chunk, as onnxruntime computes the file."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [entry.name for entry in session.get_inputs()]

    def run(*inputs: np.ndarray) -> np.ndarray:
        (chunk,) = session.run(None, dict(zip(names, inputs, strict=True)))
        return chunk

    return run


def compare(exported: Exported, allowed: float, flag: str, runs: int = 20) -> Comparison:
    """Run the written file and the policy on the same random inputs.

    Raises:
        UserError: an action differs by more than is allowed, or is nan.
    """
    difference = 0.0
    export_seconds = []
    policy_seconds = []
    for _ in range(runs):
        inputs = [torch.rand_like(tensor) for tensor in exported.example]
        begun = time.perf_counter()
        chunk = exported.run(*(tensor.numpy() for tensor in inputs))
        export_seconds.append(time.perf_counter() - begun)

        begun = time.perf_counter()
        with torch.no_grad():
            expected = exported.core(*inputs).numpy()
        policy_seconds.append(time.perf_counter() - begun)
        difference = np.maximum(difference, np.abs(chunk - expected).max())  # nan stays nan
    if not difference <= allowed:
        raise UserError(
            f"{flag}: the exported network differs too much from the policy: expected at most {allowed:g}, "
            f"got {difference:.2g}. Nothing was written: export without {flag}"
        )
    return Comparison(
        difference=float(difference),
        export_ms=1000 * float(np.median(export_seconds)),
        policy_ms=1000 * float(np.median(policy_seconds)),
    )


def describe(loaded, exported: Exported, comparison: Comparison) -> dict:
    """What a program needs to know to run the exported network."""
    config = loaded.policy.config
    shapes = [list(tensor.shape) for tensor in exported.example]
    depth = {}  # by the network's own names of its inputs
    for key in config.input_features:
        recorded = loaded.depth.get(name_before_rename(loaded.preprocess, key))
        if recorded is not None:
            depth[key] = asdict(recorded)
    return {
        "policy": config.type,
        "task": loaded.task,
        "inputs": dict(zip(exported.names, shapes, strict=True)),
        "output": {"chunk": [1, config.chunk_size, config.action_feature.shape[0]]},
        "n_action_steps": config.n_action_steps,
        **{name: getattr(config, name) for name in SMOOTHING if hasattr(config, name)},
        "image_size": resize_of(loaded.preprocess),
        "depth": depth,
        "normalise": normalisation(loaded.preprocess),
        "unnormalise": normalisation(loaded.postprocess),
        "largest_difference": comparison.difference,
    }


def normalisation(pipeline) -> dict:
    """{feature: {mode, mean, std, ...}} of a pipeline's (un)normaliser, as plain lists."""
    features = {}
    for step in pipeline.steps:
        if not hasattr(step, "norm_map"):
            continue
        for key, feature in step.features.items():
            mode = step.norm_map.get(feature.type)
            entry = {"mode": getattr(mode, "value", "IDENTITY")}
            for name, value in (step.stats.get(key) or {}).items():
                if name != "count":
                    entry[name] = np.asarray(value).tolist()
            features[key] = entry
    return features


def quantize(path: Path) -> Callable[..., np.ndarray]:
    """Store the weights of an ONNX file in 8 bits, in place; returns a function that runs it, as `onnx_runner` does."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    model = onnx.load(str(path))
    transpose_weights(model.graph)
    del model.graph.value_info[:]  # shapes that the exporter noted, some of them of weights that are now transposed

    # Two kinds of layers stay in fp32: those that multiply by no weight matrix, such as the keypoints' coordinates, and
    # the last layer, which is small and sets the actions' precision.
    vectors = {tensor.name for tensor in model.graph.initializer if len(tensor.dims) < 2}
    kept = []
    for node in model.graph.node:
        if node.op_type in ("MatMul", "Gemm") and (node.input[1] in vectors or "action" in node.input[1]):
            kept.append(node.name)

    smaller = path.with_name(f"{path.name}.int8")
    quantize_dynamic(
        model,
        str(smaller),
        op_types_to_quantize=["MatMul", "Gemm"],
        per_channel=True,
        weight_type=QuantType.QInt8,
        nodes_to_exclude=kept,
        extra_options={"DefaultTensorType": onnx.TensorProto.FLOAT},
    )
    smaller.replace(path)
    return onnx_runner(path)


def transpose_weights(graph) -> None:
    """Store the weights of linear layers as they are multiplied, (in, out), instead of as PyTorch keeps them, (out, in).

    Otherwise the quantizer transposes a weight for each layer that uses it, and stores it as often. Flow uses its head twice.
    """
    from onnx import numpy_helper

    weights = {tensor.name: tensor for tensor in graph.initializer}
    transposed = set()
    for node in graph.node:
        if node.op_type != "Gemm" or node.input[1] not in weights:
            continue
        for attribute in node.attribute:
            if attribute.name == "transB" and attribute.i:
                attribute.i = 0
                transposed.add(node.input[1])
    for name in transposed:
        values = numpy_helper.to_array(weights[name])
        weights[name].CopyFrom(numpy_helper.from_array(values.T.copy(), name))

    # The graph itself transposes the same weights for its MatMul nodes: these nodes go, and their readers take the weights.
    redundant = [node for node in graph.node if node.op_type == "Transpose" and node.input[0] in transposed]
    weight_of = {node.output[0]: node.input[0] for node in redundant}
    for node in graph.node:
        node.input[:] = [weight_of.get(name, name) for name in node.input]
    for node in redundant:
        graph.node.remove(node)
