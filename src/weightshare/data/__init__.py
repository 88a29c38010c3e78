"""Data sets by name, samples that ship with the library, text that every machine has."""

from weightshare._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "digits": ["Digits", "load_digits"],
        "lookup": ["about", "known_samples", "locate"],
        "stdlib": ["SourceFile", "gather_sources", "split_sources", "write_corpus"],
    },
)
