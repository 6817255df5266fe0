"""Predict the next chunk while the arm carries out this one, so that no control tick waits for the network.

What is carried out until the prediction is there is settled already, and the new chunk goes over from it.
Source: Black et al. "Real-Time Execution of Action Chunking Flow Policies" (2025).
"""

import contextlib
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch

from errors import UserError
from policy.chunk import predict_chunk


class AsyncPolicy:
    """Acts as a LoadedPolicy does, on chunks that a thread predicts from the observation `lead` ticks before they are needed.

    Args:
        loaded: infer.LoadedPolicy.
        lead: control ticks that predicting a chunk takes, 1 or more.

    Raises:
        UserError: chunks are too short for that.
    """

    def __init__(self, loaded, lead: int):
        config = loaded.policy.config
        self.loaded, self.policy, self.lead = loaded, loaded.policy, lead
        if getattr(config, "temporal_ensemble_coeff", None) is not None:
            raise UserError("temporal ensembling asks for a chunk at every tick: --ahead does not go with it")
        if loaded.relative:
            raise UserError(
                "the policy's actions are relative to the state they were predicted from: --ahead does not go with it"
            )
        given = [name for name in ("chunk_size", "action_chunk_size", "n_action_steps") if hasattr(config, name)]
        if not given:
            raise UserError(f"policy {loaded.kind} predicts no chunks: --ahead does not go with it")
        length = getattr(config, given[0])  # T; a policy without a chunk size of its own gives what it carries out
        if 2 * lead > length:
            raise UserError(
                f"a chunk takes {lead} control ticks to predict and has {length} actions ({given[0]}): expected {2 * lead} or more"
            )
        # carried out of each chunk, with room for going over to the next one after what is settled
        room = length - lead - getattr(config, "blend_steps", 0)
        self.count = max(lead, min(max(getattr(config, "n_action_steps", 1), lead), room))
        self.device, self.kind, self.expected = loaded.device, loaded.kind, loaded.expected
        self.stream = None
        if torch.device(self.device).type == "cuda":  # in one queue with it an action would wait for the chunk
            self.stream = torch.cuda.Stream(self.device)
        self.thread, self.pending = ThreadPoolExecutor(1, "chunks"), None
        self.reset()

    def reset(self) -> None:
        """Forget the chunk under way and the observations gone by: call it when an episode starts."""
        if self.pending is not None:
            self.pending.exception()  # waits for it
        self.loaded.reset()
        self.seen: deque = deque(maxlen=getattr(self.policy.config, "n_obs_steps", 1))
        self.chunk: torch.Tensor | None = None  # (1, T, A)
        self.pending: Future | None = None
        # steps of the chunk: the one due now, the first that is not carried out, the one that was due when the next was asked for
        self.at = self.end = self.asked_at = 0

    def act(self, observation: dict) -> np.ndarray:
        """The action to carry out now: as LoadedPolicy.act; only an episode's first one waits for a chunk."""
        return self.select(self.loaded.batch_of(observation)).squeeze(0).cpu().numpy()

    def select(self, batch: dict) -> torch.Tensor:
        """(1, A) the action to carry out now in robot units, for a LeRobot batch of one moment's observation."""
        with torch.inference_mode():
            moment = self.loaded.preprocess(batch)
            self.seen.append(moment)
            while len(self.seen) < self.seen.maxlen:
                self.seen.append(moment)
            if self.chunk is None:
                self._take(self._ask(None).result(), 0)
            elif self.at == self.end:
                self._take(self.pending.result(), self.at - self.asked_at)
            if self.pending is None and self.end - self.at <= self.lead:
                self.pending, self.asked_at = self._ask(self.chunk[:, self.at :]), self.at
            self.at += 1
            return self.loaded.postprocess(self.chunk[:, self.at - 1])

    def _ask(self, rest: torch.Tensor | None) -> Future:
        return self.thread.submit(self._predict, list(self.seen), rest)

    def _predict(self, seen: list[dict], rest: torch.Tensor | None) -> torch.Tensor:
        """(1, T, A) from the last observations; `rest` (1, R, A) is what was planned from now on."""
        config, now = self.policy.config, dict(seen[-1])
        if config.observation_delta_indices is not None:  # history has an axis of its own
            now |= {key: torch.stack([moment[key] for moment in seen], dim=1) for key in config.input_features}
        with torch.inference_mode(), torch.cuda.stream(self.stream) if self.stream else contextlib.nullcontext():
            if self.stream:
                self.stream.wait_stream(torch.cuda.default_stream(self.device))  # for the observations
            chunk = predict_chunk(self.policy, now, rest, self.lead)
            if self.stream:
                self.stream.synchronize()
            return chunk

    def _take(self, chunk: torch.Tensor, passed: int) -> None:
        """Go over to a chunk that was asked for some ticks ago."""
        self.chunk, self.pending, self.at = chunk, None, passed
        self.end = min(passed + self.count, chunk.shape[1])
