# shellcheck shell=bash
#
# Functions for everything that needs PostgreSQL with event_store in it: tests, demo, bench, developers.
#
#   . test/lib/server.sh
#   es_setup demo                  # packages, unprivileged user, build, private tree, work directory
#   es_server_init "$ES_WORK/a" 'shared_buffers = 1GB'
#   es_server_start
#   es_psql -c 'SELECT 1'
#
# Nothing outside a temporary directory and a cache is written, but for missing Debian packages. The
# PostgreSQL that is installed is never changed: es_make_tree copies it (PostgreSQL finds its libraries and
# share files relative to its executable) and event_store is installed into the copy.
#
# What callers may read or set:
#   PG_CONFIG   pg_config of the PostgreSQL to use           (default: the newest that is installed)
#   ES_CACHE    where builds are kept between runs           (default: ~/.cache/event_store)
#   ES_KEEP     1 = keep the work directory also on success
#   ES_ROOT     the checkout
#   ES_WORK     work directory, owned by ES_USER, removed at exit unless something failed
#   ES_BUILD    copy of the sources in which event_store was built, with fault points unless ES_FAULTS=0
#   ES_TREE     the private PostgreSQL; ES_BIN its bin directory, ES_PGXS its pgxs/src directory
#   ES_USER     who runs servers and tests: ourselves, or `postgres` when we are root
#   ES_SERVER   directory of the current server

ES_ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
ES_CACHE=${ES_CACHE:-${HOME:-/tmp}/.cache/event_store}
ES_FAULTS=${ES_FAULTS:-1}

# A server of ours is never found, or missed, because of what the caller has set for others.
unset PGHOST PGHOSTADDR PGPORT PGUSER PGDATABASE PGDATA PGOPTIONS PGPASSWORD PGPASSFILE PGSERVICE PGSERVICEFILE

es_note() { printf '== %s\n' "$*" >&2; }
es_warn() { printf 'warning: %s\n' "$*" >&2; }
es_die() {
	printf 'error: %s\n' "$*" >&2
	exit 1
}

# ---------------------------------------------------------------------------------------------------------
# Packages

# Runs a command as root; status 126 if we can become root neither directly nor through sudo.
es_as_root() {
	if [[ $EUID -eq 0 ]]; then
		"$@"
	elif command -v sudo >/dev/null && { sudo -n true 2>/dev/null || [[ -t 0 ]]; }; then
		sudo "$@"
	else
		return 126
	fi
}

es_package_installed() {
	[[ $(dpkg-query -W -f '${db:Status-Status}' "$1" 2>/dev/null) == installed ]]
}

# apt-get install, with fresh package lists if the old ones do not do.
es_apt_install() {
	local apt=(env DEBIAN_FRONTEND=noninteractive apt-get -qq -o DPkg::Lock::Timeout=300 -o Dpkg::Use-Pty=0)
	local install=("${apt[@]}" install -y --no-install-recommends "$@")
	local status=0 log

	log=$(mktemp)
	# The first try fails where the lists are absent or name versions that are gone from the mirror.
	es_as_root "${install[@]}" >"$log" 2>&1 </dev/null || status=$?
	if [[ $status -ne 0 && $status -ne 126 ]]; then
		status=0
		{ es_as_root "${apt[@]}" update && es_as_root "${install[@]}"; } >"$log" 2>&1 </dev/null || status=$?
	fi
	if [[ $status -ne 0 ]]; then
		tail -n 20 "$log" >&2
		rm -f "$log"
		return "$status"
	fi
	rm -f "$log"
}

# Installs what of the named packages is missing. Installing postgresql-NN would create and start a cluster
# `main`; that is switched off while we install, and the setting is put back as it was found.
es_install_packages() {
	local package missing=() conf=/etc/postgresql-common/createcluster.conf saved='' status=0

	if ! command -v dpkg-query >/dev/null || ! command -v apt-get >/dev/null; then
		return 0 # not a Debian: the compiler will say what is missing
	fi
	for package; do
		es_package_installed "$package" || missing+=("$package")
	done
	[[ ${#missing[@]} -gt 0 ]] || return 0

	es_note "installing packages: ${missing[*]}"
	if [[ " ${missing[*]} " == *' postgresql-'[0-9]* ]]; then
		es_package_installed postgresql-common || es_apt_install postgresql-common || status=$?
		if [[ $status -eq 0 ]]; then
			saved=$(mktemp)
			cat "$conf" >"$saved" 2>/dev/null || true
			es_as_root sh -c "sed -i '/^[[:space:]]*create_main_cluster/d' $conf;
				echo 'create_main_cluster = false' >> $conf" || status=$?
		fi
	fi
	[[ $status -ne 0 ]] || es_apt_install "${missing[@]}" || status=$?
	if [[ -n $saved ]]; then
		es_as_root sh -c "cat '$saved' > $conf"
		rm -f "$saved"
	fi
	[[ $status -eq 0 ]] || es_die "packages are missing; as root run:
    apt-get update && apt-get install --no-install-recommends ${missing[*]}"
}

# ---------------------------------------------------------------------------------------------------------
# PostgreSQL

# True if $1 is a pg_config with which an extension can be built and a server started.
es_pg_usable() {
	local pgxs bindir

	pgxs=$("$1" --pgxs 2>/dev/null) && bindir=$("$1" --bindir 2>/dev/null) &&
		[[ -f $pgxs && -x $bindir/postgres && -x $bindir/initdb ]]
}

# Prints the pg_config to use when PG_CONFIG is not set: the one in PATH, else Debian's newest.
es_pg_search() {
	local candidate

	for candidate in pg_config $(printf '%s\n' /usr/lib/postgresql/*/bin/pg_config | sort -rV); do
		if es_pg_usable "$candidate"; then
			echo "$("$candidate" --bindir)/pg_config"
			return
		fi
	done
}

# Installs the packages that build and tests need, and sets PG_CONFIG and ES_MAJOR.
es_find_pg() {
	local packages=(gcc libc6-dev make perl liburing-dev liblz4-dev libzstd-dev libipc-run-perl) major

	if [[ -n ${PG_CONFIG:-} ]]; then
		PG_CONFIG=$(command -v "$PG_CONFIG") || es_die "PG_CONFIG: there is no such program"
	else
		PG_CONFIG=$(es_pg_search)
	fi
	if [[ -z $PG_CONFIG ]] && command -v apt-cache >/dev/null; then
		# The distribution's own version is what the package `postgresql` depends on.
		# Without package lists, as in an image of Debian, it fails.
		major=$(apt-cache depends postgresql 2>/dev/null | sed -n 's/.*Depends: postgresql-\([0-9]*\)$/\1/p') || major=''
		if [[ -z $major ]] && es_as_root apt-get -qq update; then
			major=$(apt-cache depends postgresql | sed -n 's/.*Depends: postgresql-\([0-9]*\)$/\1/p') || major=''
		fi
		major=${major:-15}
		packages+=("postgresql-$major" "postgresql-server-dev-$major")
	fi
	es_install_packages "${packages[@]}"
	if [[ -z $PG_CONFIG ]]; then
		PG_CONFIG=$(es_pg_search)
	fi
	[[ -n $PG_CONFIG ]] || es_die "no PostgreSQL with server headers found; set PG_CONFIG=/path/to/pg_config"
	es_pg_usable "$PG_CONFIG" || es_die "$PG_CONFIG belongs to no complete PostgreSQL (server and PGXS)"
	es_pg_consistent
	ES_MAJOR=$("$PG_CONFIG" --version | sed 's/^PostgreSQL \([0-9]*\).*/\1/')
	export PG_CONFIG ES_MAJOR
}

# Warns if PGXS is not the one of this PostgreSQL: another build that was installed over it changes
# compiler flags, contrib modules and static libraries without a word.
es_pg_consistent() {
	local makefile mine theirs

	makefile=$(dirname "$(dirname "$("$PG_CONFIG" --pgxs)")")/Makefile.global
	mine=$("$PG_CONFIG" --version | cut -d " " -f 2)
	theirs=$(sed -n "s/^VERSION = //p" "$makefile")
	[[ $mine == "$theirs" ]] ||
		es_warn "$makefile was installed by another build ($theirs) than $PG_CONFIG ($mine):
         flags, static libraries and loadable modules may be that build's too. For Debian packages:
         apt-get install --reinstall postgresql-${mine%%.*} postgresql-server-dev-${mine%%.*}"
}

# Copies the PostgreSQL of PG_CONFIG below $1, at the same absolute paths, and sets ES_TREE, ES_BIN, ES_PGXS.
es_make_tree() {
	local tree=$1 dir stamp

	ES_TREE=$tree
	ES_BIN=$tree$("$PG_CONFIG" --bindir)
	ES_PGXS=$(dirname "$(dirname "$tree$("$PG_CONFIG" --pgxs)")")
	LD_LIBRARY_PATH=$tree$("$PG_CONFIG" --libdir)${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
	export ES_TREE ES_BIN ES_PGXS LD_LIBRARY_PATH

	stamp=$(for dir in --version --configure --bindir --pkglibdir --sharedir; do "$PG_CONFIG" "$dir"; done &&
		stat -c '%n %Y %s' "$("$PG_CONFIG" --bindir)"/* "$("$PG_CONFIG" --pkglibdir)"/*)
	[[ $stamp != "$(cat "$tree/.stamp" 2>/dev/null)" ]] || return 0

	rm -rf "$tree"
	for dir in "$("$PG_CONFIG" --bindir)" "$("$PG_CONFIG" --pkglibdir)" "$("$PG_CONFIG" --sharedir)"; do
		mkdir -p "$tree$dir"
		# Only JIT inlining reads bitcode/, and does without; it is half of the bytes.
		tar -C "$dir" --exclude=./bitcode --exclude=./man -cf - . | tar -C "$tree$dir" --no-same-owner -xf -
	done
	# A PostgreSQL with a prefix of its own brings its own libpq, which ES_USER may not be able to read there.
	dir=$("$PG_CONFIG" --libdir)
	if [[ -e $dir/libpq.so.5 && $dir != /usr/lib* ]]; then
		mkdir -p "$tree$dir"
		cp -a "$dir"/libpq.so* "$tree$dir/"
	fi
	for dir in --pkglibdir --sharedir; do
		[[ $("$ES_BIN/pg_config" "$dir") == "$tree"/* ]] ||
			es_die "the copy of PostgreSQL in $tree does not use its own files ($dir); was it built as relocatable?"
	done
	gcc -O1 -Wall -o "$ES_BIN/reaper" "$ES_ROOT/test/lib/reaper.c" || es_die "cannot compile test/lib/reaper.c"
	printf '%s\n' "$stamp" >"$tree/.stamp"
}

# ---------------------------------------------------------------------------------------------------------
# Build

# Makes directory $2 a copy of the sources in $1. What differs gets the time of now, not its own: a file that
# is saved while the last copy is compiled would look older than the objects that were made without it. Build
# products in $2 stay, so that make rebuilds nothing else; those in $1 do not come along.
es_sync_source() {
	local from=$1 to=$2 list changed file

	mkdir -p "$to"
	list=$(mktemp)
	changed=$(mktemp)
	(cd "$from" && find . \( -name .git -o -path ./build -o -path ./bin -o -path ./results \) -prune -o \
		\( -type f -o -type l \) ! -name '*.o' ! -name '*.d' ! -name '*.so' ! -name '*.a' ! -name '*.bc' \
		! -name '.build-flags' -print | LC_ALL=C sort) >"$list"
	while IFS= read -r file; do
		cmp -s "$from/$file" "$to/$file" || printf '%s\n' "$file"
	done <"$list" >"$changed"
	# Others may be editing: a file that changes or vanishes while it is read comes with the next run.
	{ tar -C "$from" -cf - --no-recursion --ignore-failed-read --warning=none -T "$changed" || [[ $? -eq 1 ]]; } |
		tar -C "$to" --no-same-owner -xmf -
	(cd "$to" && find . \( -path ./build -o -path ./bin \) -prune -o \
		\( -type f -o -type l \) ! -name '*.o' ! -name '*.d' ! -name '*.so' ! -name '*.a' ! -name '*.bc' \
		! -name '.build-flags' -print | LC_ALL=C sort | LC_ALL=C comm -13 "$list" - |
		while IFS= read -r gone; do rm -f "$gone"; done)
	rm -f "$list" "$changed"
}

# make without what an outer make left in the environment, niced; as many jobs as there are cores.
es_make() {
	env -u MAKEFLAGS -u MFLAGS -u MAKELEVEL -u MAKEOVERRIDES \
		nice make --no-print-directory -j"$(nproc)" PG_CONFIG="$PG_CONFIG" FAULTS="$ES_FAULTS" "$@"
}

# Prints the first lines of a build's errors, not pages of what follows from them.
es_build_log_excerpt() {
	grep -nE -m 20 'error:|warning:|undefined reference|[*][*][*]' "$1" >&2 || tail -n 20 "$1" >&2
}

# Builds the checkout in directory $1 (a copy of the sources) and installs it into $ES_TREE, together with
# the extensions in test/modules. Sets ES_BUILD.
es_build() {
	local dir=$1 log module

	ES_BUILD=$dir
	export ES_BUILD
	mkdir -p "$dir"
	(
		flock 9
		es_sync_source "$ES_ROOT" "$dir"
		log=$dir/build.log
		if ! es_make -C "$dir" all >"$log" 2>&1 || ! es_make -C "$dir" -s install DESTDIR="$ES_TREE" >>"$log" 2>&1; then
			es_build_log_excerpt "$log"
			es_die "the build failed; its output is in $log"
		fi
		! grep -E 'warning:' "$log" >&2 || es_warn "the build printed warnings, see $log"
		for module in "$dir"/test/modules/*/Makefile; do
			[[ -f $module ]] || continue
			if ! es_make -C "$(dirname "$module")" -s install DESTDIR="$ES_TREE" >>"$log" 2>&1; then
				es_build_log_excerpt "$log"
				es_die "the build of $(dirname "$module") failed; its output is in $log"
			fi
		done
	) 9>"$dir.lock" || exit 1
}

# Where the build for this checkout, this PostgreSQL and these flags is kept between runs.
es_build_dir() {
	local key

	key=$(printf '%s\n' "$ES_ROOT" "$PG_CONFIG" "$ES_FAULTS" | cksum | cut -d ' ' -f 1)
	if mkdir -p "$ES_CACHE/build" 2>/dev/null && [[ -w $ES_CACHE/build ]]; then
		echo "$ES_CACHE/build/pg$ES_MAJOR-$key"
	else
		echo "$ES_WORK/build"
	fi
}

# ---------------------------------------------------------------------------------------------------------
# User and work directory

# PostgreSQL refuses to run as root.
es_find_user() {
	if [[ $EUID -ne 0 ]]; then
		ES_USER=$(id -un)
	elif id postgres >/dev/null 2>&1; then
		ES_USER=postgres
	else
		ES_USER=nobody
	fi
	export ES_USER
}

# Runs a command as ES_USER, in ES_WORK (the caller's directory may not be readable for that user).
es_as_user() {
	(
		cd "${ES_WORK:-/}" || exit 1
		export HOME=${ES_WORK:-/}
		if [[ $EUID -eq 0 ]]; then
			exec setpriv --reuid="$ES_USER" --regid="$(id -g "$ES_USER")" --init-groups -- "$@"
		else
			exec "$@"
		fi
	)
}

# A directory below $1 or, where ES_USER cannot reach that, /tmp.
es_temp_dir() {
	local dir

	dir=$(mktemp -d "${TMPDIR:-/tmp}/es-$1.XXXXXX")
	chmod 755 "$dir"
	if [[ $EUID -eq 0 ]] && ! ES_WORK=/ es_as_user test -x "$dir"; then
		rmdir "$dir"
		dir=$(mktemp -d "/tmp/es-$1.XXXXXX")
		chmod 755 "$dir"
	fi
	[[ $EUID -ne 0 ]] || chown "$ES_USER:" "$dir"
	echo "$dir"
}

# Makes ES_WORK and sees to its end: servers in it are stopped; it is removed on success, else kept and named.
es_work_dir() {
	ES_WORK=$(es_temp_dir "$1")
	export ES_WORK
	trap 'es_at_exit $?' EXIT
	trap 'exit 130' INT
	trap 'exit 143' TERM HUP
}

es_at_exit() {
	local status=$1 pidfile

	trap - EXIT INT TERM HUP
	# Every server whose data directory lies in ES_WORK, whoever started it.
	find "$ES_WORK" -name postmaster.pid -not -path '*/backup/*' 2>/dev/null | while read -r pidfile; do
		es_kill_data_dir "$(dirname "$pidfile")" QUIT
	done
	if [[ $status -eq 0 && ${ES_KEEP:-0} != 1 ]]; then
		rm -rf "$ES_WORK"
	else
		es_note "files of this run are kept in $ES_WORK"
	fi
	! declare -F es_last_words >/dev/null || es_last_words
	exit "$status"
}

# ---------------------------------------------------------------------------------------------------------
# Servers. One lives in a directory: data/, log, and s/ for its socket. All functions take that directory as
# an optional argument; without it they mean ES_SERVER, the one named last.

es_server_use() {
	ES_SERVER=${1:-$ES_SERVER}
	PGHOST=$(cat "$ES_SERVER/socket_dir")
	PGPORT=$(cat "$ES_SERVER/port")
	PGUSER=postgres
	PGDATABASE=${ES_DATABASE:-postgres}
	export ES_SERVER PGHOST PGPORT PGUSER PGDATABASE
}

# es_server_init DIR [postgresql.conf line…]
es_server_init() {
	local dir=$1 socket=$1/s port=${ES_PORT:-54329}
	shift

	es_as_user mkdir -p "$dir"
	# A socket's path has at most 107 bytes.
	if [[ ${#socket} -gt 80 ]]; then
		socket=$(TMPDIR=/tmp es_temp_dir s)
	else
		es_as_user mkdir -p "$socket"
	fi
	es_as_user "$ES_BIN/initdb" -D "$dir/data" -U postgres -A trust -k -N -E UTF8 --locale=C.UTF-8 \
		>"$ES_WORK/initdb.log" 2>&1 || {
		cat "$ES_WORK/initdb.log" >&2
		es_die "initdb failed"
	}
	es_as_user tee -a "$dir/data/postgresql.conf" >/dev/null <<-CONF
		listen_addresses = ''
		unix_socket_directories = '$socket'
		port = $port
		shared_preload_libraries = 'event_store'
		max_worker_processes = 32
		fsync = on
		log_line_prefix = '%m [%p] %b '
		$([[ -z ${ES_IO_METHOD:-} ]] || echo "event_store.io_method = '$ES_IO_METHOD'")
		$(printf '%s\n' "$@")
	CONF
	es_as_user tee "$dir/socket_dir" <<<"$socket" >/dev/null
	es_as_user tee "$dir/port" <<<"$port" >/dev/null
	es_server_use "$dir"
}

es_server_start() {
	es_server_use "${1:-}"
	if ! es_as_user "$ES_BIN/reaper" "$ES_BIN/pg_ctl" -D "$ES_SERVER/data" -l "$ES_SERVER/log" -w -t 120 start \
		>"$ES_WORK/pg_ctl.log" 2>&1 </dev/null; then
		tail -n 20 "$ES_SERVER/log" >&2
		es_die "the server did not start; its log is $ES_SERVER/log"
	fi
}

# es_server_stop [DIR [fast|immediate|smart]]
es_server_stop() {
	es_server_use "${1:-}"
	es_as_user "$ES_BIN/pg_ctl" -D "$ES_SERVER/data" -m "${2:-fast}" -w -t 120 stop \
		>"$ES_WORK/pg_ctl.log" 2>&1 </dev/null || {
		tail -n 20 "$ES_SERVER/log" >&2
		es_die "the server did not stop; its log is $ES_SERVER/log"
	}
}

es_server_restart() {
	es_server_stop "$@"
	es_server_start "${1:-}"
}

es_server_running() {
	es_server_use "${1:-}"
	es_as_user "$ES_BIN/pg_ctl" -D "$ES_SERVER/data" status >/dev/null 2>&1
}

# Children of process $1, one a line.
es_children() {
	local pid ppid

	for pid in /proc/[0-9]*; do
		ppid=$(sed -n 's/^PPid:[[:space:]]*//p' "$pid/status" 2>/dev/null) || continue
		[[ $ppid != "$1" ]] || echo "${pid#/proc/}"
	done
}

# Sends signal $2 to the server with data directory $1, with KILL to every process of it, and waits for
# their end. Nothing happens unless the process in postmaster.pid works in that very directory.
es_kill_data_dir() {
	local data=$1 signal=$2 pid pids=() i

	pid=$(head -n 1 "$data/postmaster.pid" 2>/dev/null) || return 0
	[[ -n $pid && $(readlink "/proc/$pid/cwd" 2>/dev/null) == "$(readlink -f "$data")" ]] || return 0
	pids=("$pid")
	if [[ $signal == KILL ]]; then
		kill -STOP "$pid" # or it would start new children meanwhile
		mapfile -t -O 1 pids < <(es_children "$pid")
	fi
	kill -"$signal" "${pids[@]}" 2>/dev/null || true
	for ((i = 0; i < 300; i++)); do
		for pid in "${pids[@]}"; do
			[[ ! -d /proc/$pid ]] || grep -q '^State:[[:space:]]*Z' "/proc/$pid/status" 2>/dev/null || {
				sleep 0.1
				continue 2
			}
		done
		return 0
	done
}

# kill -9 of postmaster and all its children, at once.
es_server_kill9() {
	es_server_use "${1:-}"
	es_kill_data_dir "$ES_SERVER/data" KILL
}

# psql on the current server, quiet, stopping at the first error.
es_psql() {
	"$ES_BIN/psql" -X -q -v ON_ERROR_STOP=1 "$@"
}

# ---------------------------------------------------------------------------------------------------------

# Everything up to the point where servers can be initialised; $1 names the work directory.
es_setup() {
	es_find_pg
	es_find_user
	es_work_dir "$1"
	es_make_tree "$ES_WORK/tree"
	es_build "$(es_build_dir)"
	[[ $EUID -ne 0 ]] || chown -R "$ES_USER:" "$ES_TREE"
	PATH=$ES_BIN:$PATH
	export PATH
}
