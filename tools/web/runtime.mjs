// All that a page needs of transformers.js.
export { AutoModelForImageClassification, LogLevel, Tensor, env } from "@huggingface/transformers";
