"""Predict the next chunk in a thread while the arm carries out the current one, so that no control tick waits for it.

The actions carried out until the prediction is ready are committed; the new chunk starts from them.
Source: Black et al. "Real-Time Execution of Action Chunking Flow Policies" (2025).

T steps of a chunk, R planned steps, A joints.
"""

import contextlib
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch

from errors import UserError
from policy.chunk import predict_chunk


class AsyncPolicy:
    """Acts like a LoadedPolicy, on chunks that a thread predicts `lead` control ticks before they are needed.

    Args:
        loaded: a LoadedPolicy.
        lead: control ticks that predicting a chunk takes, 1 or more.

    Attributes:
        actions_per_chunk: how many actions of each chunk are carried out.

    Raises:
        UserError: the policy does not predict chunks, or they are shorter than twice the lead.
    """

    def __init__(self, loaded, lead: int):
        self.loaded = loaded
        self.policy = loaded.policy
        self.device = loaded.device
        self.kind = loaded.kind
        self.expected = loaded.expected
        self.optional = loaded.optional
        self.needed = loaded.needed
        self.lead = lead
        self.actions_per_chunk = count_actions_per_chunk(loaded, lead)
        self.thread = ThreadPoolExecutor(1, "chunks")
        self.pending: Future | None = None  # the next chunk, (1, T, A)
        self.stream = None
        if torch.device(self.device).type == "cuda":
            # in the default stream, an action would wait for the chunk that is being predicted
            self.stream = torch.cuda.Stream(self.device)
        self.reset()

    def reset(self) -> None:
        """Start an episode: forget past observations and chunks, also the one being predicted."""
        if self.pending is not None:
            self.pending.exception()  # waits for it
        self.loaded.reset()
        self.history: deque[dict] = deque(maxlen=getattr(self.policy.config, "n_obs_steps", 1))
        self.pending = None
        self.chunk: torch.Tensor | None = None  # (1, T, A)
        self.index = 0  # of the action in the chunk that is due now
        self.end = 0  # index of the first action that is not carried out
        self.requested_at = 0  # index that was due when the pending chunk was requested

    def act(self, observation: dict) -> np.ndarray:
        """The action to carry out now, as LoadedPolicy.act. Only the first call of an episode waits for a chunk."""
        return self.select(self.loaded.batch_of(observation)).squeeze(0).cpu().numpy()

    def select(self, batch: dict) -> torch.Tensor:
        """(1, A) the action to carry out now in robot units, for LeRobot's batch of one moment's observation."""
        with torch.inference_mode():
            observation = self.loaded.preprocess(batch)
            self.history.append(observation)
            while len(self.history) < self.history.maxlen:
                self.history.append(observation)  # at the start of an episode, repeat the first observation

            # Change to the next chunk where this one ends. It was predicted for an earlier tick: skip what is past.
            if self.chunk is None:
                self._start(self._request(planned=None).result(), first=0)
            elif self.index == self.end:
                self._start(self.pending.result(), first=self.index - self.requested_at)

            # Request the next chunk as many ticks ahead as it takes.
            if self.pending is None and self.end - self.index <= self.lead:
                self.requested_at = self.index
                self.pending = self._request(planned=self.chunk[:, self.index :])

            action = self.chunk[:, self.index]  # (1, A)
            self.index += 1
            return self.loaded.postprocess(action)

    def _start(self, chunk: torch.Tensor, first: int) -> None:
        """Carry out a chunk (1, T, A) from its action `first` on."""
        self.chunk = chunk
        self.pending = None
        self.index = first
        self.end = min(first + self.actions_per_chunk, chunk.shape[1])

    def _request(self, planned: torch.Tensor | None) -> Future:
        return self.thread.submit(self._predict, list(self.history), planned)

    def _predict(self, history: list[dict], planned: torch.Tensor | None) -> torch.Tensor:
        """(1, T, A) from the last observations; `planned` (1, R, A) are the actions planned from the last of them on."""
        config = self.policy.config
        batch = dict(history[-1])
        if config.observation_delta_indices is not None:
            for key in config.input_features.keys() & batch.keys():  # not the cameras that stay empty
                batch[key] = torch.stack([observation[key] for observation in history], dim=1)  # (1, S, ...)
        stream = contextlib.nullcontext() if self.stream is None else torch.cuda.stream(self.stream)
        with torch.inference_mode(), stream:
            if self.stream is not None:
                self.stream.wait_stream(torch.cuda.default_stream(self.device))  # for the observations
            chunk = predict_chunk(self.policy, batch, planned, self.lead)
            if self.stream is not None:
                self.stream.synchronize()
            return chunk


def count_actions_per_chunk(loaded, lead: int) -> int:
    """How many actions of a chunk to carry out: n_action_steps, as far as the chunk is long enough for the lead.

    Raises:
        UserError: the policy does not predict chunks ahead, or they are shorter than twice the lead.
    """
    config = loaded.policy.config
    if getattr(config, "temporal_ensemble_coeff", None) is not None:
        raise UserError("temporal ensembling asks for a chunk at every tick. Act without --ahead")
    if loaded.relative:
        raise UserError("the policy's actions are relative to the state they were predicted from. Act without --ahead")
    # a policy without a chunk size of its own returns the actions that it carries out
    names = [name for name in ("chunk_size", "action_chunk_size", "n_action_steps") if hasattr(config, name)]
    if not names:
        raise UserError(f"policy {loaded.kind} predicts no chunks. Act without --ahead")
    length = getattr(config, names[0])  # T
    if length < 2 * lead:
        raise UserError(
            f"a chunk takes {lead} control ticks to predict and has {length} actions ({names[0]}): "
            f"expected {2 * lead} or more. Act at a lower rate, or without --ahead"
        )
    # The next chunk needs room to blend, after the actions that are committed while it is predicted.
    longest = length - lead - getattr(config, "blend_steps", 0)
    wanted = max(getattr(config, "n_action_steps", 1), lead)
    return max(lead, min(wanted, longest))
