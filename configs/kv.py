"""KV-cache compression against fundamental abilities (arXiv:2502.01941): the study, and ShotKV's claim on row recall.

    python -m jaxfw.launch --config=configs/kv.py --workdir=runs/kv              # any model: --config.model=DIR
    python -m jaxfw.launch --config=configs/kv.py:claim --workdir=runs/kv-claim  # trains its models, three seeds
    ... --config.study.methods="('snapkv(w=8)@keep={keep}', 'adakv(w=8)@keep={keep},kv=int4')"

The study asks embedded-1 for seven abilities, with prompts of about 200 tokens each: about an hour on two
cores, and a run that was stopped goes on where it was. lm-eval's tasks run by name with `--model_args kv=...`
(docs/kv.md).
"""

from ml_collections import ConfigDict

from jaxfw.core.config import parse_arg


def get_config(arg: str = "") -> ConfigDict:
    """Mini-arguments: `smoke` (few items, methods and steps), `claim` (row recall instead of the study)."""
    args = parse_arg(arg, smoke=False, claim=False)
    c = ConfigDict()
    c.experiment = "experiments.kv"
    c.part = "claim" if args.claim else "study"
    c.model = "embedded-1"  # or a Hugging Face directory

    c.study = ConfigDict()
    # task:shots, at the standard level: prompts of 171 to 208 tokens of embedded-1
    c.study.abilities = (
        "facts:12", "composition:6", "arithmetic:4", "code:2", "safety:8", "retrieval:0", "long_output:1",
    )  # fmt: skip
    c.study.more = ("arithmetic:1@0.2", "arithmetic:16@0.1", "rule:4@0.2")  # for the observations, by `few` methods
    c.study.methods = (
        "streaming@keep={keep}", "random@keep={keep}", "knorm@keep={keep}", "keydiff@keep={keep}",
        "snapkv(w=8)@keep={keep}", "h2o@keep={keep}", "tova@keep={keep}", "pyramidkv(w=8,beta=2)@keep={keep}",
        "expected@keep={keep}", "chunkkv(w=8)@keep={keep}", "chunkkv(w=8,reuse=2)@keep={keep}",
        "lagkv(lag=16)@keep={keep}", "snapkv(w=8)@keep={keep},decode=slide(window=24,recent=8)",
        "shotkv(w=8)@keep={keep}", "shotkv(w=8)@keep={keep},rd={keep}", "shotkv(w=8,extra=0)@keep={keep}",
        "shotkv(w=8,scope=global)@keep={keep}", "randomshot@keep={keep}",
        "adakv(w=8)@keep={keep}", "critical(w=8)@keep={keep}", "snapkv(w=8)@keep={keep},kv=int8",
        "snapkv(w=8)@keep={keep},kv=int4(residual=8)", "snapkv(w=8)@keep={keep},kv=int2(residual=8)",
        "adakv(w=8)@keep={keep},kv=int4(residual=8)",
    )  # fmt: skip
    c.study.few = (
        "streaming@keep={keep}", "h2o@keep={keep}", "snapkv(w=8)@keep={keep}", "pyramidkv(w=8,beta=2)@keep={keep}",
        "chunkkv(w=8)@keep={keep}", "shotkv(w=8)@keep={keep}",
    )  # fmt: skip
    c.study.keeps = (0.4, 0.2, 0.1)
    c.study.compared = 0.2  # where the other protocols are measured
    c.study.protocol = "refeed"
    c.study.asked = 64
    c.study.room = 384  # cache slots, the same for all abilities: one compiled program a method and budget
    c.study.seed = 0

    c.recall = ConfigDict()
    c.recall.tasks = ("rows",)  # also "long rows"
    c.recall.relatives = ()  # "pairs", "shifts": one model each, reported beside the claim
    c.recall.seeds = (0, 1, 2, 3, 4, 5)  # in this order, until `models` have learned the task
    c.recall.models = 3
    c.recall.steps = 5000
    c.recall.batch = 32
    c.recall.learning_rate = 6e-3
    c.recall.width = 64
    c.recall.layers = 2
    c.recall.asked = 512
    c.recall.shares = (0.4, 0.27)  # of the prompt
    c.recall.methods = (
        "shotkv@budget={budget}", "shotkv(scope=global)@budget={budget}", "randomshot@budget={budget}",
        "oracleshot@budget={budget}", "chunkkv(size=5,w=2)@budget={budget}", "snapkv(w=2)@budget={budget}",
        "snapkv(w=2,kernel=1)@budget={budget}", "h2o@budget={budget},decode=grow", "tova@budget={budget},decode=grow",
        "streaming(sinks=1)@budget={budget},decode=grow", "knorm@budget={budget}",
    )  # fmt: skip

    if args.smoke:
        c.study.abilities = ("retrieval:0",)
        c.study.more = ()
        c.study.methods = ("snapkv(w=8)@keep={keep}", "shotkv(w=8)@keep={keep},rd={keep}")
        c.study.few = ("snapkv(w=8)@keep={keep}",)
        c.study.keeps = (0.2,)
        c.study.asked = 4
        c.recall.tasks = ("rows",)
        c.recall.relatives = ()
        c.recall.seeds = (0,)
        c.recall.models = 1
        c.recall.steps = 4
        c.recall.asked = 8
        c.recall.methods = ("shotkv@budget={budget}", "snapkv(w=2)@budget={budget}", "randomshot@budget={budget}",
                            "tova@budget={budget},decode=grow")  # fmt: skip
    return c.lock()
