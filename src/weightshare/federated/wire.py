"""What travels between server and participant, and how a reply is checked before it is touched.

To a participant, ``train.personal``: ``round`` (number, scale of its last update, checksum of the
model it must start from), and either ``model`` (all weights) or ``reward``. Back: ``update``, one
flat float32 array, and ``report`` (round and checksum it belongs to).

A reward of k of D entries is a bit for each entry and k values, in index order: 4 k + D / 8 bytes;
more than half of the entries are sent as the whole vector with zeros. Neither shows what others
were given.
"""

import io
import zlib
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict

from weightshare.federated.vectors import Vector, squared_norm

TRAIN, REWARD, PLAIN = "train.personal", "query.reward", "train"
"""Message types: a personal round, the last reward, and a round of Flower's own strategies."""


class Rejected(Exception):
    """A reply that cannot be used; says why, in a few words."""


@dataclass(frozen=True)
class Ticket:
    """What a participant was sent this round, and its answer must refer to."""

    name: str
    round: int
    checksum: int


def checksum(model: Vector) -> int:
    """CRC-32 of a model: two sides that lost step notice it."""
    return zlib.crc32(np.ascontiguousarray(model).data)


def advance(model: Vector, sent: Vector | None, scale: float, reward: Vector | None) -> Vector:
    """``w + s·u + v``, in this order in float32, so that both sides get the same bits."""
    result = model.copy()
    if sent is not None and scale:
        result += np.float32(scale) * sent
    if reward is not None:
        result += reward
    return result


def array(values: np.ndarray[Any, Any]) -> Array:
    """A flat array as Flower's, in one copy instead of the three of NumPy's writer."""
    flat = np.ascontiguousarray(values)
    data = b"".join((_header(flat.dtype.str, len(flat)), flat.data))
    return Array(flat.dtype.name, flat.shape, "numpy.ndarray", data)


def order(
    ticket: Ticket,
    *,
    scale: float = 0.0,
    model: Vector | None = None,
    reward: tuple[np.ndarray[Any, Any] | None, Vector] | None = None,
) -> RecordDict:
    """What a participant is sent. ``reward`` is (support, values on it), or (None, whole vector);
    None for nothing."""
    facts = {"round": ticket.round, "scale": float(scale), "checksum": ticket.checksum}
    content = RecordDict({"round": ConfigRecord(facts)})
    if model is not None:
        content["model"] = ArrayRecord({"weights": array(model)})
    if reward is not None:
        support, values = reward
        arrays = {"values": array(values)}
        if support is not None:
            arrays["support"] = array(np.packbits(support))
        content["reward"] = ArrayRecord(arrays)
    return content


def reward_in(content: RecordDict, dimension: int) -> Vector | None:
    """The reward of an order as a vector, ``(D,)``; None where there is none."""
    if "reward" not in content:
        return None
    arrays = content["reward"]
    values = read_vector(arrays["values"], arrays["values"].shape[0])
    if "support" not in arrays:
        return values
    support = np.unpackbits(arrays["support"].numpy(), count=dimension).astype(bool)
    reward = np.zeros(dimension, np.float32)
    reward[support] = values
    return reward


def payload(content: RecordDict) -> int:
    """Bytes of the arrays in a message."""
    # content.array_records would build a checked dictionary first, which takes ten times as long.
    records = [record for record in content.values() if isinstance(record, ArrayRecord)]
    return sum(len(packed.data) for record in records for packed in record.values())


def answer(update: Vector, number: int, check: int) -> RecordDict:
    """A participant's update."""
    return RecordDict(
        {
            "update": ArrayRecord({"update": array(update)}),
            "report": ConfigRecord({"round": number, "checksum": check}),
        }
    )


def lost(number: int) -> RecordDict:
    """A participant's request for its model."""
    return RecordDict({"report": ConfigRecord({"round": number, "lost": True})})


def read_update(
    message: Message, ticket: Ticket, dimension: int, longest: float = 0.0
) -> tuple[Vector, float] | None:
    """The update of a reply to ``ticket``, ``(D,)`` float32, and its squared norm; None where the
    model was lost. A norm above ``longest`` is implausible; 0 is no limit.

    Raises:
        Rejected: anything at all is not as it must be. Sizes are compared before bytes are read.
    """
    if message.has_error():
        raise Rejected("error at the participant")
    content = message.content
    if "report" not in content or not isinstance(content["report"], ConfigRecord):
        raise Rejected("no report")
    report = dict(content["report"])
    if report.get("round") != ticket.round or isinstance(report.get("round"), bool):
        raise Rejected("answer to another round")
    if set(content) == {"report"} and report == {"round": ticket.round, "lost": True}:
        return None
    if set(content) != {"report", "update"} or set(report) != {"round", "checksum"}:
        raise Rejected("unexpected records")
    if report["checksum"] != ticket.checksum:
        raise Rejected("answer from another model")
    if not isinstance(content["update"], ArrayRecord) or set(content["update"]) != {"update"}:
        raise Rejected("unexpected arrays")
    update, square = read_measured(content["update"]["update"], dimension)
    if longest and square > longest**2:
        raise Rejected("implausibly long")
    return update, square


def read_vector(packed: Array, dimension: int) -> Vector:
    """``read_measured`` without the norm."""
    return read_measured(packed, dimension)[0]


def read_measured(packed: Array, dimension: int) -> tuple[Vector, float]:
    """A flat float32 vector of known size out of a Flower array, without a copy; and ``Σ x²``.

    The embedded header is compared byte for byte with the one NumPy writes, so that what is
    declared, what is embedded and what is there are one thing, and nothing is parsed.

    Raises:
        Rejected: another type, shape, header or length, or an entry that is not finite.
    """
    if packed.stype != "numpy.ndarray" or packed.dtype != "float32":
        raise Rejected("not float32")
    if tuple(packed.shape) != (dimension,):
        raise Rejected("another shape")
    header = _header("<f4", dimension)
    if len(packed.data) != len(header) + 4 * dimension:
        raise Rejected("another length")
    if not packed.data.startswith(header):
        raise Rejected("another header")
    vector = np.frombuffer(packed.data, np.float32, dimension, len(header))
    square = squared_norm(vector)
    if not np.isfinite(square):
        raise Rejected("entries that are not finite")
    return vector, square


@lru_cache(maxsize=64)
def _header(kind: str, length: int) -> bytes:
    buffer = io.BytesIO()
    facts = {"descr": kind, "fortran_order": False, "shape": (length,)}
    np.lib.format.write_array_header_1_0(buffer, facts)
    return buffer.getvalue()
