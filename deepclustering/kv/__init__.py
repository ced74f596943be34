from deepclustering.core.lazy import attach

__getattr__, __dir__, __all__ = attach(__name__, eviction=("StreamingLLM", "H2O", "TOVA", "KeyDiff", "SnapKV", "ExpectedAttention", "Random", "KeyNorm"),
                                       stages=("PyramidInfer", "DynamicKV"), budgets=("AdaSnapKV", "PyramidKV", "EntropySnapKV"), grain=("ChunkKV",))
