package hmm

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"trireme.dev/shared/hbm/protocol"
	"trireme.dev/shared/mem"

	"trireme.dev/services/hmm/ledger"
)

// session is one client's connection.
type session struct {
	d    *Daemon
	conn *net.UnixConn
	peer *peer // nil: the kernel does not tell who it is

	id             ledger.Conn
	instance, role string

	writing sync.Mutex // one write at a time
	queued  sync.Mutex // guards out
	out     []byte     // replies that are not written yet, whole frames

	working sync.WaitGroup // allocations, and questions that wait
	allocs  chan struct{}
	finds   chan struct{}
}

// refuse says why and closes.
func (s *session) refuse(why error) {
	s.reply(0, why, nil)
	_ = s.conn.Close()
	if s.peer != nil {
		s.peer.close()
	}
}

// abort ends the session from outside.
func (s *session) abort() {
	_ = s.conn.Close()
	s.peer.close()
}

// serve runs the session to its end, and on until the client's process has no maps any more.
func (s *session) serve() {
	p := s.peer
	defer p.close()
	r := bufio.NewReaderSize(s.conn, 64<<10)
	if err := s.hello(r); err != nil {
		s.d.log.Info("client refused", "pid", p.pid, "error", err)
		s.refuse(err)
		return
	}
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	bye, err := s.requests(ctx, r)
	cancel() // nobody waits for what is being pulled
	if err != nil && !errors.Is(err, io.EOF) && !errors.Is(err, net.ErrClosed) && !errors.Is(err, unix.ECONNRESET) {
		s.d.log.Warn("client dropped", "instance", s.instance, "pid", p.pid, "error", err)
		s.reply(0, err, nil)
	}
	s.working.Wait()
	s.d.books.do(func(l *ledger.Ledger, _ time.Time) {
		if bye == 0 {
			l.Died(s.id)
		} else {
			l.Disconnect(s.id)
		}
	})
	s.d.gone(s.instance, s.role)
	if bye != 0 {
		s.d.books.reap(s.id)
		s.reply(bye, nil, nil)
		_ = s.conn.Close()
		return
	}
	_ = s.conn.Close()
	s.free()
	if p.wait() {
		s.d.books.reap(s.id)
	}
}

// free makes room for another connection, while this one waits for its process to exit.
func (s *session) free() {
	s.d.mu.Lock()
	defer s.d.mu.Unlock()
	if s.d.stopping {
		return
	}
	delete(s.d.sessions, s)
	s.d.watched[s] = true
}

// hello reads the first request and answers it.
func (s *session) hello(r io.Reader) error {
	if err := s.conn.SetReadDeadline(time.Now().Add(helloTimeout)); err != nil {
		return fmt.Errorf("waiting for a hello: %w", err)
	}
	payload, err := protocol.ReadFrame(r)
	if err != nil {
		return fmt.Errorf("waiting for a hello: %w: %w", mem.ErrInvalid, err)
	}
	id, op, body, err := protocol.ParseRequest(payload)
	if err != nil || op != protocol.OpHello {
		return errors.Join(fmt.Errorf("the first request is no hello: %w", mem.ErrInvalid), err)
	}
	var h protocol.Hello
	if err := protocol.Decode(body, &h); err != nil {
		return err
	}
	if h.Version != protocol.Version {
		return fmt.Errorf("the HMM speaks version %d, %q speaks %d: %w", protocol.Version, h.Instance, h.Version, protocol.ErrVersion)
	}
	if len(h.Instance) > 128 || len(h.Role) > 32 || len(h.Name) > 128 {
		return fmt.Errorf("instance, role or name is too long: %w", mem.ErrInvalid)
	}
	npus, err := s.connect(h)
	if err != nil {
		return err
	}
	s.instance, s.role = h.Instance, h.Role
	if err := s.conn.SetReadDeadline(time.Time{}); err != nil {
		return s.retire(fmt.Errorf("welcoming: %w", err))
	}
	if err := s.welcome(id, npus); err != nil {
		return s.retire(err)
	}
	return nil
}

// retire takes back a connection of one who was never told of it.
func (s *session) retire(err error) error {
	s.d.books.do(func(l *ledger.Ledger, _ time.Time) { l.Disconnect(s.id) })
	s.d.books.reap(s.id)
	return err
}

// connect enters the client into the books. NPUs and the name of an instance that has just died become free when its process is
// found to have exited: its successor waits for that.
func (s *session) connect(h protocol.Hello) ([]int, error) {
	deadline := time.NewTimer(npuWait)
	defer deadline.Stop()
	for {
		var npus []int
		var err error
		var reaped chan struct{}
		leaving := false
		s.d.books.do(func(l *ledger.Ledger, now time.Time) {
			s.id, npus, err = l.Connect(now, h)
			reaped, leaving = s.d.books.reaped, l.Leaving(h.Name)
		})
		if err == nil || errors.Is(err, mem.ErrInvalid) || !leaving {
			return npus, err
		}
		select {
		case <-reaped:
		case <-deadline.C:
			return nil, err
		case <-s.d.quit:
			return nil, err
		}
	}
}

// welcome sends the first answer with the descriptors.
func (s *session) welcome(id uint64, npus []int) error {
	w := protocol.Welcome{
		Version: protocol.Version, Node: s.d.cfg.Node, NPUs: npus, Slots: s.d.table.Len(), Spaces: s.d.rooms, Domains: s.d.domains,
		Board: true,
	}
	if s.role == protocol.RoleGateway {
		w.Spaces, w.Domains, w.Board = w.Spaces[:1], nil, false
	}
	fds := []int{int(s.d.table.File().Fd())}
	for i := range w.Spaces {
		fds = append(fds, int(s.d.stores[i].File().Fd()))
	}
	if w.Board {
		fds = append(fds, int(s.d.board.File().Fd()))
	}
	frame, err := protocol.Reply(id, nil, w)
	if err != nil {
		return err
	}
	s.writing.Lock()
	defer s.writing.Unlock()
	if err := s.conn.SetWriteDeadline(time.Now().Add(s.d.cfg.WriteTimeout)); err != nil {
		return fmt.Errorf("welcoming: %w", err)
	}
	if n, _, err := s.conn.WriteMsgUnix(frame, unix.UnixRights(fds...), nil); err != nil || n < len(frame) {
		return fmt.Errorf("welcoming with %d of %d bytes: %w", n, len(frame), errors.Join(err, mem.ErrLost))
	}
	return nil
}

// requests answers one request after the other until the client leaves: bye is then the id of its last request, which
// is still to be answered. It returns an error when the connection ends otherwise.
func (s *session) requests(ctx context.Context, r *bufio.Reader) (bye uint64, err error) {
	for {
		payload, err := protocol.ReadFrame(r)
		if err != nil {
			return 0, err
		}
		id, op, body, err := protocol.ParseRequest(payload)
		if err != nil {
			return 0, err
		}
		var a protocol.Attach
		if op == protocol.OpAttach {
			if err := protocol.Decode(body, &a); err != nil {
				s.reply(id, err, nil)
				continue
			}
		}
		plain := false // answered at once
		switch op {
		case protocol.OpAlloc, protocol.OpFindMM, protocol.OpWeights:
		case protocol.OpAttach:
			plain = !s.d.pulls(a)
		default:
			plain = true
		}
		if !plain {
			s.flush() // nobody waits for what this may take
		}
		switch op {
		case protocol.OpBye:
			return id, nil
		case protocol.OpAlloc: // takes the time of touching memory, so others go on beside it
			s.allocs <- struct{}{}
			s.working.Go(func() {
				out, err := s.alloc(body)
				<-s.allocs
				s.reply(id, err, out)
			})
		case protocol.OpFindMM, protocol.OpWeights: // waits for another client, so it must not keep this one's other requests waiting
			select {
			case s.finds <- struct{}{}:
			default:
				s.reply(id, fmt.Errorf("%d questions for MM objects or weights wait already: %w", maxFinds, mem.ErrExhausted), nil)
				continue
			}
			find := s.findMM
			if op == protocol.OpWeights {
				find = s.findWeights
			}
			s.working.Go(func() {
				out, err := find(ctx, body)
				<-s.finds
				s.reply(id, err, out)
			})
		case protocol.OpAttach:
			if !plain {
				s.allocs <- struct{}{}
				s.working.Go(func() {
					out, err := s.attachCopies(ctx, a)
					<-s.allocs
					s.reply(id, err, out)
				})
				continue
			}
			out, err := s.attach(a)
			s.answered(id, err, out, r)
		default:
			out, err := s.answer(op, body)
			s.answered(id, err, out, r)
		}
	}
}

// maxQueued is the most bytes of replies that wait for others, to be written together.
const maxQueued = 64 << 10

// answered queues a reply, and writes all that are queued unless another request is here already.
func (s *session) answered(id uint64, failure error, body any, r *bufio.Reader) {
	if s.queue(id, failure, body) > maxQueued || !another(r) {
		s.flush()
	}
}

// another reports whether the reader has a whole frame.
func another(r *bufio.Reader) bool {
	if r.Buffered() < 4 {
		return false
	}
	head, err := r.Peek(4)
	return err == nil && r.Buffered()-4 >= int(binary.BigEndian.Uint32(head))
}

// reply answers a request now.
func (s *session) reply(id uint64, failure error, body any) {
	s.queue(id, failure, body)
	s.flush()
}

// queue encodes a reply for the next flush and returns how many bytes wait for it.
func (s *session) queue(id uint64, failure error, body any) int {
	frame, err := protocol.Reply(id, failure, body)
	if err != nil {
		if frame, err = protocol.Reply(id, err, nil); err != nil {
			panic(fmt.Sprintf("BUG: an error that cannot be encoded: %v", err))
		}
	}
	s.queued.Lock()
	defer s.queued.Unlock()
	s.out = append(s.out, frame...)
	return len(s.out)
}

// flush writes the replies that are queued. A client that does not take them in time is dropped.
func (s *session) flush() {
	s.writing.Lock()
	defer s.writing.Unlock()
	s.queued.Lock()
	out := s.out
	s.out = nil
	s.queued.Unlock()
	if len(out) == 0 {
		return
	}
	if err := s.conn.SetWriteDeadline(time.Now().Add(s.d.cfg.WriteTimeout)); err != nil {
		return // closed
	}
	if _, err := s.conn.Write(out); err != nil {
		_ = s.conn.Close() // requests finds out
	}
}
