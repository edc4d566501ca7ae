"""The pass types of every Olive there was: those that are translated, and for the others what to use instead."""

from __future__ import annotations

from phinetune.errors import did_you_mean

TRANSLATED = (
    "LoRA",
    "QLoRA",
    "LoftQ",
    "DoRA",
    "MergeAdapterWeights",
    "ModelBuilder",
    "GenAIModelExporter",
    "OnnxConversion",
    "ExtractAdapters",
    "Rtn",
)
_INT4 = "use ModelBuilder with precision int4"
_INT8 = "use ModelBuilder with precision int8"
_HALF = "use ModelBuilder with precision fp16"
_LORA = "use LoRA"
_OUT = "leave it out: ModelBuilder builds an optimized graph"
_OTHER = "leave it out: models are built for ONNX Runtime GenAI only"
_WHOLE = "leave it out: a model is built in one piece"
_TUNED = "leave it out: the builder sets the session up, and evaluate measures it"
_PRUNED = "leave it out: models are not pruned"
_ADVICE = {
    _INT4: "AutoAWQQuantizer GptqQuantizer Gptq GptqModel QuaRot SpinQuant OnnxMatMul4Quantizer OnnxBnb4Quantization "
    "OnnxBlockWiseRtnQuantization OnnxHqqQuantization OnnxKquantQuantization AutoClip SelectiveMixedPrecision RotateQuant "
    "KQuant Hqq NVModelOptQuantization MatMulNBitsToQDQ OnnxWeightOnlyQuantization",
    _INT8: "OnnxQuantization OnnxDynamicQuantization OnnxStaticQuantization IncQuantization IncDynamicQuantization "
    "IncStaticQuantization QuantizationAwareTraining VitisAIQuantization VitisQDQQuantizer VitisQOpQuantizer PowerOfTwoMethod "
    "OpenVINOQuantization OpenVINOQuantizationWithAccuracy SNPEQuantization AimetQuantization QuarkQuantization",
    _HALF: "OnnxFloatToFloat16 OrtMixedPrecision OnnxIOFloat16ToFloat32 OnnxIODataTypeConverter MixedPrecisionOverrides",
    "use OnnxConversion": "OptimumConversion OnnxOpVersionConversion OpenVINOOptimumConversion",
    _LORA: "LoHa LoKr SDLoRA",
    _OUT: "OrtTransformersOptimization OrtTransformerOptimization OptimumMerging OnnxModelOptimizer OnnxPeepholeOptimizer "
    "OnnxScriptFusion InsertBeamSearch AppendPrePostProcessingOps DynamicToFixedShape GraphSurgeries OnnxDAGOptimizer "
    "ComposeOnnxModels MoEExpertsDistributor TrtMatMulToConvTransform ReplaceAttentionMaskValue",
    _TUNED: "OrtPerfTuning OrtSessionParamsTuning",
    _OTHER: "OpenVINOConversion OpenVINOEncapsulation OpenVINOIoUpdate OpenVINOReshape SNPEConversion SNPEtoONNXConversion "
    "QNNConversion QNNModelLibGenerator QNNContextBinaryGenerator QNNPreprocess TorchTRTConversion EPContextBinaryGenerator "
    "StaticLLM VitisGenerateModelLLM QairtPreparation QairtGenAIBuilder QairtEncapsulation TensorRTConversion",
    _WHOLE: "CaptureSplitInfo SplitModel PyTorchTensorParallel",
    _PRUNED: "SparseGPT SliceGPT TorchPruning",
}
ADVICE = {name: advice for advice, names in _ADVICE.items() for name in names.split()}
"""Olive's other pass types -> what to do."""
_BY_LOWER = {name.lower(): name for name in (*TRANSLATED, *ADVICE)}


def known_type(given: str) -> str | None:
    """The spelling in the table of a pass type that is translated; None for every other."""
    name = _BY_LOWER.get(given.lower())
    return name if name in TRANSLATED else None


def refusal(given: str) -> str:
    """Why a pass of the type `given` is not translated, and what to do."""
    name = _BY_LOWER.get(given.lower())
    if name is not None:
        return f"{name} is not supported; {ADVICE[name]}"
    meant = did_you_mean(given.lower(), _BY_LOWER)
    for lower, proper in sorted(_BY_LOWER.items(), key=lambda item: -len(item[0])):
        meant = meant.replace(f'"{lower}"', f'"{proper}"')
    return f"no pass is of this type{meant} (found: {given!r})"
