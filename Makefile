# event_store
#
#   make                 build for the PostgreSQL of PG_CONFIG (default: pg_config in PATH)
#   make install         into that PostgreSQL
#   make installcheck    regression and isolation tests against a running server that preloads event_store
#   make unit, fuzz      src/core/ as ordinary programs, under sanitizers
#   make tools           programs that print our files: bin/
#
# What follows needs no PostgreSQL to be there; it installs what is missing and works in private servers:
#
#   make check           all tests that CI runs         make check-long      and those that take hours
#   make check-cassert   with assertions in the server  make check-matrix    with PostgreSQL 16, 17 and 18
#   make demo            what it is, in a minute        make bench           measured against heap tables
#   make format, format-check, layers                   make torture ROUNDS=n   random load, random kills

EXTENSION  = event_store
MODULE_big = event_store
DATA       = sql/event_store--1.0.sql
PGFILEDESC = "event_store - event store with shards outside the heap"

# Objects, one list per layer (src/README.md); a layer uses only what stands above it here, but for
# shard and maint, which nobody uses.
TOP_OBJS = \
	src/event_store.o \
	src/guc.o

CORE_OBJS = \
	src/core/arith.o \
	src/core/batch.o \
	src/core/batch_build.o \
	src/core/filter.o \
	src/core/finish.o \
	src/core/format.o \
	src/core/intvec.o \
	src/core/manifest.o \
	src/core/manifest_edit.o \
	src/core/message.o \
	src/core/metapage.o \
	src/core/page.o \
	src/core/page_encode.o \
	src/core/route.o \
	src/core/segment_block.o \
	src/core/segment_cache.o \
	src/core/segment_context.o \
	src/core/segment_reader.o \
	src/core/segment_verify.o \
	src/core/segment_writer.o \
	src/core/segment_zone.o \
	src/core/wal.o

IPC_OBJS = \
	src/ipc/answer.o \
	src/ipc/channel.o \
	src/ipc/fault.o \
	src/ipc/horizon.o \
	src/ipc/jobs.o \
	src/ipc/logmsg.o \
	src/ipc/piece.o \
	src/ipc/position.o \
	src/ipc/server.o \
	src/ipc/server_send.o \
	src/ipc/shmem.o

SHARD_OBJS = \
	src/shard/adopt.o \
	src/shard/apply.o \
	src/shard/arena.o \
	src/shard/build.o \
	src/shard/carry.o \
	src/shard/collect.o \
	src/shard/control.o \
	src/shard/drop.o \
	src/shard/event_filter.o \
	src/shard/event_ids.o \
	src/shard/files.o \
	src/shard/finish.o \
	src/shard/finish_pending.o \
	src/shard/flush.o \
	src/shard/flush_request.o \
	src/shard/heads.o \
	src/shard/keeper.o \
	src/shard/log.o \
	src/shard/log_file.o \
	src/shard/log_replay.o \
	src/shard/log_write.o \
	src/shard/manifest_file.o \
	src/shard/memindex.o \
	src/shard/memtable.o \
	src/shard/pgwal.o \
	src/shard/prepare.o \
	src/shard/prepare_check.o \
	src/shard/prepare_rows.o \
	src/shard/recovery.o \
	src/shard/scan.o \
	src/shard/scan_any.o \
	src/shard/scan_context.o \
	src/shard/scan_filter.o \
	src/shard/scan_mem.o \
	src/shard/scan_order.o \
	src/shard/scan_output.o \
	src/shard/scan_view.o \
	src/shard/scan_window.o \
	src/shard/segment_rows.o \
	src/shard/segments.o \
	src/shard/spill.o \
	src/shard/stat.o \
	src/shard/store.o \
	src/shard/task.o \
	src/shard/txn.o \
	src/shard/uring.o \
	src/shard/verdict.o \
	src/shard/versions.o \
	src/shard/wait.o \
	src/shard/worker.o

MAINT_OBJS = \
	src/maint/build.o \
	src/maint/collect.o \
	src/maint/collect_database.o \
	src/maint/worker.o

TAM_OBJS = \
	src/tam/commit.o src/tam/content.o \
	src/tam/dead.o \
	src/tam/estimate.o \
	src/tam/given.o \
	src/tam/handler.o \
	src/tam/hooks.o \
	src/tam/kept.o \
	src/tam/locks.o \
	src/tam/own.o \
	src/tam/publication.o \
	src/tam/reader.o \
	src/tam/refusal.o \
	src/tam/roles.o \
	src/tam/scan.o \
	src/tam/send.o \
	src/tam/spool.o \
	src/tam/table.o \
	src/tam/template.o \
	src/tam/vacuum.o \
	src/tam/xact.o

PLAN_OBJS =

SQLFN_OBJS = \
	src/sqlfn/append.o \
	src/sqlfn/append_plan.o \
	src/sqlfn/args.o \
	src/sqlfn/control.o \
	src/sqlfn/event_map.o \
	src/sqlfn/follow.o \
	src/sqlfn/read.o \
	src/sqlfn/stat.o

# The program that prints our files: these, and src/core/.
FILEDUMP_OBJS = \
	src/tools/es_filedump.o \
	src/tools/print_log.o \
	src/tools/print_manifest.o \
	src/tools/print_segment.o \
	src/tools/words.o

OBJS = $(TOP_OBJS) $(CORE_OBJS) $(IPC_OBJS) $(SHARD_OBJS) $(MAINT_OBJS) $(TAM_OBJS) $(PLAN_OBJS) $(SQLFN_OBJS)

# Regression tests, in order: sql/NAME.sql, expected/NAME.out.
REGRESS = basic refused append replay types ddl exec restore functions guards triggers

# Isolation tests: test/isolation/specs/NAME.spec, test/isolation/expected/NAME.out.
ISOLATION = visibility versions horizon serializable cursors savepoints restore

# FAULTS=1 compiles the fault points in. For tests only, and their default.
FAULTS ?= 0

# ---------------------------------------------------------------------------------------------------------
# Tests, demo and bench: scripts that find, or install, PostgreSQL by themselves.

SCRIPTED = check check-long check-cassert check-matrix demo bench torture format format-check layers

ifneq ($(filter $(SCRIPTED),$(MAKECMDGOALS)),)
ifneq ($(filter-out $(SCRIPTED),$(MAKECMDGOALS)),)
$(error run the targets $(filter $(SCRIPTED),$(MAKECMDGOALS)) in a call of their own)
endif

C_FILES = $(sort $(wildcard src/*.[ch] src/*/*.[ch] test/unit/*.[ch] test/fuzz/*.[ch] test/modules/*/*.[ch] \
	test/bench/limits/*.[ch]))

.PHONY: $(SCRIPTED)

check:
	@test/run-check

check-long:
	@test/long/run

check-cassert:
	@test/cassert/run

check-matrix:
	@test/matrix/run

demo:
	@EVENTS='$(EVENTS)' test/demo/run

bench:
	@DURATION='$(SECONDS)' test/bench/run

torture:
	@ES_ROUNDS='$(or $(ROUNDS),100)' test/run-check --only torture

format:
	@test/lib/format $(C_FILES)

format-check:
	@test/lib/format --check $(C_FILES)

layers:
	@test/lib/check_layers

else
# ---------------------------------------------------------------------------------------------------------
# The extension

PG_CONFIG ?= pg_config
WERROR ?= -Werror

# PostgreSQL's own headers do not survive -Wextra without the -Wno-s.
PG_CPPFLAGS = -I$(srcdir)/src
PG_CFLAGS = -Wall -Wextra $(WERROR) -Wno-unused-parameter -Wno-sign-compare -Wno-missing-field-initializers \
	-Wno-declaration-after-statement -MMD -MP
SHLIB_LINK += -luring -llz4 -lzstd
ifeq ($(FAULTS),1)
PG_CPPFLAGS += -DES_FAULT_POINTS
endif

REGRESS_OPTS = --inputdir=$(srcdir) --encoding=UTF8 --no-locale
ISOLATION_OPTS = --inputdir=$(srcdir)/test/isolation --encoding=UTF8 --no-locale
EXTRA_CLEAN = $(OBJS:.o=.d) .build-flags build bin

PGXS := $(shell $(PG_CONFIG) --pgxs)
ifeq ($(wildcard $(PGXS)),)
$(error $(PG_CONFIG) names no PGXS; install the server's development package or set PG_CONFIG=/path/to/pg_config)
endif
# Bitcode would only serve to inline our functions into JIT-compiled expressions.
override with_llvm = no
# Since 16 PGXS hides all functions that are not marked; event_store_test calls some of ours.
override CFLAGS_SL_MODULE =
include $(PGXS)

-include $(OBJS:.o=.d)

# Objects depend on the flags they were made with, so that those with and without fault points, or for
# different servers, never mix.
BUILD_FLAGS := $(VERSION) $(CC) $(CFLAGS) $(CPPFLAGS)
.PHONY: FORCE
ifneq ($(file <.build-flags),$(BUILD_FLAGS))
.build-flags: FORCE
endif
.build-flags:
	@:$(file >$@,$(BUILD_FLAGS))

$(OBJS): .build-flags

# ---------------------------------------------------------------------------------------------------------
# src/core/ without a server: unit tests, fuzzers, tools. CRC-32C is PostgreSQL's, from its static libraries.

# A failed build of one program must not hide the others, so each is on its own.
UNIT = $(patsubst test/unit/%.c,build/unit/%,$(wildcard test/unit/test_*.c))
FUZZ = $(patsubst test/fuzz/%.c,build/fuzz/%,$(wildcard test/fuzz/fuzz_*.c))
TOOLS = bin/es_filedump
FUZZ_SECONDS ?= 20

PLAIN_CPPFLAGS = -Isrc -isystem $(shell $(PG_CONFIG) --includedir-server) -DFRONTEND -D_GNU_SOURCE
ifeq ($(FAULTS),1)
PLAIN_CPPFLAGS += -DES_FAULT_POINTS
endif
PLAIN_CFLAGS = -std=gnu11 -g -Wall -Wextra $(WERROR) -Wno-unused-parameter -Wno-sign-compare \
	-Wno-missing-field-initializers -fno-strict-aliasing -MMD -MP
PLAIN_LIBS = -L$(shell $(PG_CONFIG) --pkglibdir) -L$(shell $(PG_CONFIG) --libdir) -lpgcommon -lpgport \
	-llz4 -lzstd -lm
SANITIZE = -O1 -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=all

UNIT_CORE = $(CORE_OBJS:src/%.o=build/unit/%.o)
FUZZ_CORE = $(CORE_OBJS:src/%.o=build/fuzz/%.o)
TOOL_CORE = $(CORE_OBJS:src/%.o=build/tools/%.o)
FILEDUMP = $(FILEDUMP_OBJS:src/%.o=build/tools/%.o)

.PHONY: unit unit-build fuzz fuzz-build tools
.SECONDARY: $(UNIT_CORE) $(FUZZ_CORE) $(TOOL_CORE) $(FILEDUMP)

unit: unit-build
	@test/lib/run_units $(UNIT)
unit-build: $(UNIT)

build/unit/core/%.o: src/core/%.c .build-flags
	@mkdir -p $(@D)
	$(CC) $(PLAIN_CFLAGS) $(SANITIZE) $(PLAIN_CPPFLAGS) -c -o $@ $<
build/unit/test_%: test/unit/test_%.c $(UNIT_CORE) .build-flags
	@mkdir -p $(@D) && rm -f $@
	$(CC) $(PLAIN_CFLAGS) $(SANITIZE) $(PLAIN_CPPFLAGS) -o $@ $< $(UNIT_CORE) $(PLAIN_LIBS)

# Fuzzers grow their corpus in build/; the seeds are test/fuzz/corpus/NAME/.
fuzz: fuzz-build
	@FUZZ_SECONDS=$(FUZZ_SECONDS) test/lib/run_fuzzers $(FUZZ)
fuzz-build: $(FUZZ)

build/fuzz/core/%.o: src/core/%.c .build-flags
	@mkdir -p $(@D)
	clang $(PLAIN_CFLAGS) $(SANITIZE) -fsanitize=fuzzer-no-link $(PLAIN_CPPFLAGS) -c -o $@ $<
build/fuzz/fuzz_%: test/fuzz/fuzz_%.c $(FUZZ_CORE) .build-flags
	@mkdir -p $(@D) && rm -f $@
	clang $(PLAIN_CFLAGS) $(SANITIZE) -fsanitize=fuzzer $(PLAIN_CPPFLAGS) -o $@ $< $(FUZZ_CORE) $(PLAIN_LIBS)

tools: $(TOOLS)

build/tools/%.o: src/%.c .build-flags
	@mkdir -p $(@D)
	$(CC) $(PLAIN_CFLAGS) -O2 $(PLAIN_CPPFLAGS) -c -o $@ $<
bin/es_filedump: $(FILEDUMP) $(TOOL_CORE) .build-flags
	@mkdir -p $(@D) && rm -f $@
	$(CC) $(PLAIN_CFLAGS) -O2 -o $@ $(FILEDUMP) $(TOOL_CORE) $(PLAIN_LIBS)

-include $(wildcard build/*/*.d build/*/core/*.d build/tools/tools/*.d)

# What run-check asks.
print-%:
	@echo '$($*)'
endif
