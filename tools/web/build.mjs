// Writes dinov3_nb/web/: what an exported page runs on, its licences, and a list of checksums. README.md says how to run it.
import { build } from "esbuild";
import { createHash } from "node:crypto";
import { existsSync, mkdirSync, readFileSync, readdirSync, writeFileSync } from "node:fs";
import { dirname, join } from "node:path";
import { fileURLToPath } from "node:url";
import { gzipSync } from "node:zlib";

const here = dirname(fileURLToPath(import.meta.url));
const out = join(here, "..", "..", "dinov3_nb", "web");
const modules = join(here, "node_modules");
const notices = process.argv[2];  // a folder with LICENSE and ThirdPartyNotices.txt of onnxruntime

const readPackage = name => JSON.parse(readFileSync(join(modules, name, "package.json"), "utf8"));

function checkVersions() {
  const transformers = readPackage("@huggingface/transformers"), runtime = readPackage("onnxruntime-web");
  const wanted = transformers.dependencies["onnxruntime-web"];
  if (wanted !== runtime.version) throw new Error(
    `transformers.js ${transformers.version} wants onnxruntime-web ${wanted}, not ${runtime.version}: change package.json`);
  if (existsSync(join(modules, "@huggingface/transformers/node_modules/onnxruntime-web")))
    throw new Error("There are two onnxruntime-web: the bundle's and the .wasm file's would not be the same.");
  if (!notices || !existsSync(join(notices, "ThirdPartyNotices.txt")))
    throw new Error("Give the folder with LICENSE and ThirdPartyNotices.txt of onnxruntime; README.md says where it is.");
}

async function bundle() {
  const result = await build({
    entryPoints: [join(here, "runtime.mjs")], bundle: true, format: "esm", platform: "browser", target: "es2022",
    minify: true, charset: "ascii", legalComments: "none", metafile: true, write: false, absWorkingDir: here,
    alias: { "onnxruntime-web/webgpu": "onnxruntime-web/wasm" },  // 14 MB in place of 27: a page runs on the CPU
  });
  return { text: result.outputFiles[0].text.trimEnd() + "\n", inputs: Object.keys(result.metafile.inputs) };
}

function bundledPackages(inputs) {
  const found = inputs.map(path => /.*node_modules\/((?:@[^/]+\/)?[^/]+)\//.exec(path)?.[0]).filter(Boolean);
  const inside = ["jinja", "tokenizers"].map(name => `node_modules/@huggingface/${name}/`);  // transformers.js comes with them built in
  return [...new Set([...found, ...inside])].sort();
}

function licenceOf(folder) {
  const about = JSON.parse(readFileSync(join(here, folder, "package.json"), "utf8"));
  const file = readdirSync(join(here, folder)).find(name => /^licen[sc]e/i.test(name));
  const text = about.name.startsWith("onnxruntime") ? readFileSync(join(notices, "LICENSE"), "utf8")
    : bundledLicence(about, file && readFileSync(join(here, folder, file), "utf8"));
  return `${about.name} ${about.version} (${about.license})\n${"-".repeat(70)}\n${text.trim()}\n`;
}

function bundledLicence(about, text) {
  if (text) return text;
  throw new Error(`${about.name} has no licence file: look one up before you pass it on.`);
}

checkVersions();
const { text, inputs } = await bundle();
const wasm = readFileSync(join(modules, "onnxruntime-web/dist/ort-wasm-simd-threaded.wasm"));
const tidy = text => text.replace(/\r\n/g, "\n").replace(/[ \t]+$/gm, "");
const licences = tidy([
  "What this page runs on, and under which licences its makers give it away. The page itself\nis part of dinov3_nb, under the Apache License 2.0, whose words are those below.\n",
  ...bundledPackages(inputs).map(licenceOf),
  `onnxruntime is built from these in turn\n${"-".repeat(70)}\n${readFileSync(join(notices, "ThirdPartyNotices.txt"), "utf8").trim()}\n`,
].join("\n\n"));
mkdirSync(out, { recursive: true });
const files = { "THIRD_PARTY_LICENSES.txt": Buffer.from(licences), "runtime.js": Buffer.from(text), "runtime.wasm.gz": gzipSync(wasm, { level: 9 }) };
for (const [name, content] of Object.entries(files)) writeFileSync(join(out, name), content);
const sums = Object.entries(files).map(([name, content]) => `${createHash("sha256").update(content).digest("hex")}  ${name}\n`);
writeFileSync(join(out, "SHA256SUMS"), sums.join(""));
for (const [name, content] of Object.entries(files)) console.log(name, content.length);
console.log(bundledPackages(inputs).join("\n"));
