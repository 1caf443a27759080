"""Known faults of PEFT, run again under the releases that had them: are they caught, and only they?

    python -m timemachine --folder=DIR         (or: nox -s timemachine)

* :mod:`timemachine.stacks`: releases side by side, each pair a stack to run under;
* :mod:`timemachine.cases`: one function per fault, which ends in one of our assertions;
* :mod:`timemachine.toys`, :mod:`timemachine.servers`, :mod:`timemachine.trainers`: the same for
  faults that no release has, each with a sound twin, made of :mod:`timemachine.parts`;
* :mod:`timemachine.sweep`: the whole contract under one stack, knowing of no fault;
* :mod:`timemachine.bugs`: what a sweep has to say of each report;
* :mod:`timemachine.catchrate`: all of it as docs/catch-rate.md;
* :mod:`timemachine.table`: what came of it, as docs/timemachine.md.
"""
