"""What every language-model command needs, once: load a model, cut text, mask, score, time it."""

from weightshare._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "load": ["LanguageModel", "cast", "load_model", "model_path", "quiet"],
        "text": [
            "Splits",
            "Windows",
            "encode",
            "pad",
            "read_documents",
            "split_documents",
            "windows",
        ],
        "instructions": [
            "Instruction",
            "encode_instructions",
            "holds_instructions",
            "read_instructions",
        ],
        "losses": ["distillation_loss", "hidden_mse", "next_token_loss"],
        "score": ["Score", "compare", "evaluate", "evaluating"],
        "likelihood": ["Likelihood", "log_likelihoods"],
        "tasks": ["Kept", "Task", "TaskScore", "above_chance", "kept", "read_task", "zero_shot"],
        "speed": ["TokensPerSecond", "decode_speed"],
        "generate": ["continue_prompts"],
    },
)
