#!/bin/sh
# debian-python.sh FOLDER: what Debian brings to an image: Python and the libraries that wheels want, and nothing else.
#
# No shell, no package manager, no set-uid program. Each package's record is kept where scanners look for it. The archive is
# that of one day ($DEBIAN_MIRROR, $DEBIAN_SNAPSHOT), so the same day gives the same files.
set -eu

folder=$1
: "${DEBIAN_MIRROR:?the address of archives of Debian, http://snapshot.debian.org/archive}"
: "${DEBIAN_SNAPSHOT:?the day of the archive, such as 20261101T000000Z}"

rm -f /etc/apt/sources.list /etc/apt/sources.list.d/*
cat > /etc/apt/sources.list <<END
deb $DEBIAN_MIRROR/debian/$DEBIAN_SNAPSHOT bookworm main
deb $DEBIAN_MIRROR/debian-security/$DEBIAN_SNAPSHOT bookworm-security main
END
echo 'Acquire::Check-Valid-Until "false";' > /etc/apt/apt.conf.d/99-archive
apt-get update -qq
DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends ca-certificates python3 python3-pip > /dev/null

packages="base-files ca-certificates gcc-12-base libbz2-1.0 libc6 libcom-err2 libcrypt1 libdb5.3 libexpat1 libffi8 libgcc-s1
libgomp1 libgssapi-krb5-2 libk5crypto3 libkeyutils1 libkrb5-3 libkrb5support0 liblzma5 libncursesw6 libnsl2
libpython3.11-minimal libpython3.11-stdlib libreadline8 libsqlite3-0 libssl3 libstdc++6 libtinfo6 libtirpc3 libuuid1
media-types netbase python3-minimal python3.11-minimal tzdata zlib1g"
mkdir -p /build/debian "$folder/var/lib/dpkg/status.d"
cd /build/debian
# shellcheck disable=SC2086 # words of a list
apt-get download -qq $packages
for package in *.deb; do
    dpkg-deb -x "$package" "$folder"
    dpkg-deb -f "$package" > "$folder/var/lib/dpkg/status.d/$(dpkg-deb -f "$package" Package)"
done

cd "$folder"
mkdir -p etc/ssl/certs tmp
cp /etc/ssl/certs/ca-certificates.crt etc/ssl/certs/
chmod 1777 tmp
printf '%s\n' 'root:x:0:0:root:/:/nonexistent' 'reimagen:x:10001:10001:reimagen:/tmp:/nonexistent' > etc/passwd
printf '%s\n' 'root:x:0:' 'reimagen:x:10001:' > etc/group
echo 'hosts: files dns' > etc/nsswitch.conf
rm -rf usr/share/doc usr/share/man usr/share/lintian usr/share/bug usr/share/info usr/share/locale usr/sbin/update-ca-certificates
find . -xdev -type f -perm /6000 -exec chmod a-s {} +
find . -xdev -mindepth 1 -type d -perm -o+w ! -path ./tmp -exec chmod o-wt {} + # nobody writes anywhere but there
