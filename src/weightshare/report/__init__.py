"""One run directory: what was asked, what was measured, what was made, and a page to read it on."""

from weightshare._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "run": ["HARMLESS", "Run"],
        "codecs": ["JSON", "TENSORS", "Codec"],
        "memo": ["Memo"],
        "store": ["read_json", "read_lines", "recover", "replacing", "write_json"],
        "redaction": ["redact", "redact_arguments", "redact_options", "redact_text"],
        "page": ["index", "render", "write_report"],
        "figures": [],
    },
)
