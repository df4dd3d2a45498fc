// One job in llama.cpp, through the binaries of node-llama-cpp: node in_llama_cpp.mjs JOB.json ANSWER.json
import {readFileSync, writeFileSync} from "node:fs";
import {createRequire} from "node:module";
import {pathToFileURL} from "node:url";

const entry = createRequire(process.cwd() + "/").resolve("node-llama-cpp");
const {getLlama} = await import(pathToFileURL(entry));

const job = JSON.parse(readFileSync(process.argv[2]));
const llama = await getLlama({gpu: false, build: "never", logLevel: "error", maxThreads: 1});
const model = await llama.loadModel({modelPath: job.model, useMmap: false});
const context = await model.createContext({
    contextSize: job.context,
    flashAttention: false,
    experimentalKvCacheKeyType: "F32",
    experimentalKvCacheValueType: "F32",
    lora: job.adapter ? {adapters: [{filePath: job.adapter}]} : undefined,
});
const sequence = context.getSequence();

const tokens = [];
const logits = [];
let ids = job.prompt;
for (let step = 0; step < job.steps; step++) {
    const asked = ids.map((id, i) => i + 1 < ids.length ? id : [id, {generateNext: {logits: true}}]);
    const row = (await sequence.controlledEvaluate(asked)).at(-1).next.logits;
    logits.push([...Array(row.size).keys()].map((id) => row.get(id)));
    tokens.push(logits.at(-1).reduce((best, value, id, all) => value > all[best] ? id : best, 0));
    ids = [tokens.at(-1)];
}
writeFileSync(process.argv[3], JSON.stringify({tokens, logits}));
process.exit(0);
