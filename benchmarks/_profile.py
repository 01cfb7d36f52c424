import time, torch, transformers
print(torch.__version__, transformers.__version__, torch.cuda.get_device_name())
torch.set_float32_matmul_precision("high")
from transformers import AutoProcessor
from vtc.testbed import pictures, training as T
from vtc.testbed.model import build_model, model_folder
from vtc.testbed.tokens import QuestionTokens
p = AutoProcessor.from_pretrained(model_folder())
qt = QuestionTokens(p.tokenizer, "cuda"); pic = pictures.load("train", "cuda")
g = torch.Generator("cuda").manual_seed(0)
def timed(f, n=10):
    for _ in range(3): f()
    torch.cuda.synchronize(); t = time.perf_counter()
    for _ in range(n): f()
    torch.cuda.synchronize(); return (time.perf_counter() - t) / n * 1e3
tr = T.PackedTrainer(build_model(p.tokenizer), qt).cuda()
w = torch.tensor(0.3, device="cuda")
for B in (512, 1024):
    print(B, "make_batch ms", timed(lambda: T.make_batch(B, qt, pic, g)), flush=True)
comp = torch.compile(tr)
for name, m in (("eager", tr), ("compiled", comp)):
    b = T.make_batch(512, qt, pic, g)
    def step():
        with torch.autocast("cuda", torch.bfloat16):
            o = m(b, w)
        o["loss"].backward()
    t = time.perf_counter(); ms = timed(step); print(name, "fwd+bwd ms", ms, "setup s", time.perf_counter() - t, torch.cuda.max_memory_allocated() / 2**30, flush=True)
from torch.profiler import profile, ProfilerActivity
with profile(activities=[ProfilerActivity.CUDA]) as prof:
    step(); T.make_batch(512, qt, pic, g); torch.cuda.synchronize()
print(prof.key_averages().table(sort_by="cuda_time_total", row_limit=22, max_name_column_width=70)[:5200])
