package transfer_test

import (
	"fmt"
	"io"
	"net"
	"os"
	"testing"

	"golang.org/x/sys/unix"

	"trireme.dev/shared/mem"
	"trireme.dev/shared/transfer"
)

// pages is mapped memory of n bytes that is there, as the HMM gives it: a memfd, so that sendfile can be compared.
func pages(b testing.TB, n int) (*os.File, []byte) {
	b.Helper()
	fd, err := unix.MemfdCreate("transfer-test", unix.MFD_CLOEXEC)
	if err != nil {
		b.Fatal(err)
	}
	f := os.NewFile(uintptr(fd), "transfer-test")
	if err := unix.Ftruncate(fd, int64(n)); err != nil {
		b.Fatal(err)
	}
	p, err := unix.Mmap(fd, 0, n, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_POPULATE)
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { _, _ = unix.Munmap(p), f.Close() })
	return f, p
}

// fixed is a Source of one object.
type fixed struct{ p []byte }

// Open implements transfer.Source.
func (f fixed) Open(mem.Handle) (transfer.Content, error) { return transfer.Content{Bytes: f.p}, nil }

// BenchmarkPull pulls over loopback: sender, kernel and taker share the machine's cores.
func BenchmarkPull(b *testing.B) {
	for _, n := range []int{64 << 10, mib, 16 * mib, 256 * mib} {
		for _, streams := range []int{1, 4} {
			if streams > 1 && n < 16*mib {
				continue // is one request, so one stream
			}
			b.Run(fmt.Sprintf("KiB=%d/streams=%d", n>>10, streams), func(b *testing.B) {
				_, src := pages(b, n)
				_, dst := pages(b, n)
				_, addr := serve(b, transfer.ServerConfig{Source: fixed{src}})
				c := connect(b, addr, transfer.ClientConfig{Streams: streams})
				h := mem.Handle{Node: "n1", Bytes: int64(n), Sealed: true, CRC: mem.Checksum(src)}
				b.SetBytes(int64(n))
				b.ReportAllocs()
				for b.Loop() {
					if err := c.Pull(b.Context(), h, dst, nil); err != nil {
						b.Fatal(err)
					}
				}
			})
		}
	}
}

// BenchmarkSend compares the ways to bring 1 MiB of mapped pages onto a TCP connection; the taker reads and forgets.
func BenchmarkSend(b *testing.B) {
	const size, frame = 64 * mib, mib
	f, p := pages(b, size)
	warm := make([]byte, 24+256<<10)
	ways := map[string]func(c *net.TCPConn, at int) error{
		"writev": func(c *net.TCPConn, at int) error {
			v := net.Buffers{make([]byte, 24), p[at : at+frame]}
			_, err := v.WriteTo(c)
			return err
		},
		"writev+crc": func(c *net.TCPConn, at int) error {
			_ = mem.Checksum(p[at : at+frame])
			v := net.Buffers{make([]byte, 24), p[at : at+frame]}
			_, err := v.WriteTo(c)
			return err
		},
		"copy+crc": func(c *net.TCPConn, at int) error { // as Server does
			for end := at + frame; at < end; {
				n := copy(warm[24:], p[at:end])
				_ = mem.Checksum(warm[24 : 24+n])
				if _, err := c.Write(warm[:24+n]); err != nil {
					return err
				}
				at += n
			}
			return nil
		},
		"sendfile": func(c *net.TCPConn, at int) error { return sendfile(c, f, at, frame) },
		"sendfile+crc": func(c *net.TCPConn, at int) error {
			_ = mem.Checksum(p[at : at+frame])
			return sendfile(c, f, at, frame)
		},
	}
	for _, name := range []string{"writev", "sendfile", "writev+crc", "sendfile+crc", "copy+crc"} {
		b.Run(name, func(b *testing.B) {
			l, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				b.Fatal(err)
			}
			defer func() { _ = l.Close() }()
			conn, err := net.Dial("tcp", l.Addr().String())
			if err != nil {
				b.Fatal(err)
			}
			taker, err := l.Accept()
			if err != nil {
				b.Fatal(err)
			}
			done := make(chan struct{})
			go func() {
				defer close(done)
				buf := make([]byte, 256<<10)
				for {
					if _, err := taker.Read(buf); err != nil {
						return
					}
				}
			}()
			b.SetBytes(frame)
			at := 0
			for b.Loop() {
				if err := ways[name](conn.(*net.TCPConn), at); err != nil {
					b.Fatal(err)
				}
				at = (at + frame) % size
			}
			_ = conn.Close()
			<-done
			_ = taker.Close()
		})
	}
}

func sendfile(c *net.TCPConn, f *os.File, at, n int) error {
	raw, err := c.SyscallConn()
	if err != nil {
		return err
	}
	offset, end := int64(at), int64(at+n)
	var inner error
	err = raw.Write(func(fd uintptr) bool {
		for offset < end {
			sent, err := unix.Sendfile(int(fd), int(f.Fd()), &offset, int(end-offset))
			switch {
			case err == unix.EAGAIN:
				return false
			case err == unix.EINTR:
			case err != nil:
				inner = err
				return true
			case sent == 0:
				inner = io.ErrUnexpectedEOF
				return true
			}
		}
		return true
	})
	if err != nil {
		return err
	}
	return inner
}
