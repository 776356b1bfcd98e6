use proptest::prelude::*;

use super::*;

/// A ClientHello message, in records of at most `record` bytes.
fn hello(sni: Option<&str>, alpn: &[&[u8]], record: usize) -> Vec<u8> {
    let vector = |length: usize, bytes: &[u8]| [&bytes.len().to_be_bytes()[8 - length..], bytes].concat();
    let extension = |kind: u16, data: &[u8]| [&kind.to_be_bytes()[..], &vector(2, data)].concat();
    let mut extensions = extension(0x2b, &[2, 3, 4]);
    if let Some(sni) = sni {
        extensions.extend(extension(0, &vector(2, &[&[0][..], &vector(2, sni.as_bytes())].concat())));
    }
    if !alpn.is_empty() {
        let list: Vec<u8> = alpn.iter().flat_map(|one| vector(1, one)).collect();
        extensions.extend(extension(16, &vector(2, &list)));
    }
    let body = [
        &[3, 3][..],
        &[7; 32],
        &vector(1, &[9; 32]),
        &vector(2, &[0x13, 1]),
        &vector(1, &[0]),
        &vector(2, &extensions),
    ];
    let message = [&[1][..], &vector(3, &body.concat())].concat();
    message.chunks(record).flat_map(|part| [&[0x16, 3, 1][..], &vector(2, part)].concat()).collect()
}

fn found(bytes: &[u8]) -> Detected {
    match detect(bytes) {
        Progress::Found(found) => found,
        Progress::More => panic!("more wanted after {:?}", String::from_utf8_lossy(bytes)),
    }
}

#[test]
fn http_and_other_first_bytes() {
    for text in [
        "GET / HTTP/1.1\r\n",
        "GET /",
        "\r\nGET / HTTP/1.1\r\n",
        "OPTIONS * HTTP/1.1\r\n",
        "CONNECT a:443 HTTP/1.1\r\n",
        "GET http://a/ HTTP/1.1\r\n",
        "PROPFIND /a HTTP/1.1\r\n",
        "PROPFIND /a HTTP/1.0\n",
        "POST /a",
    ] {
        assert_eq!(found(text.as_bytes()), Detected::Http1, "{text}");
    }
    assert_eq!(found(PREFACE), Detected::Http2);
    assert_eq!(found(&[PREFACE, b"more"].concat()), Detected::Http2);
    for text in [
        "SSH-2.0-x\r\n",
        "*1\r\n$4\r\nPING\r\n",
        "GET key\r\n",
        "get key\r\n",
        "EHLO a\r\n",
        "\0\0\0\x08",
        "PRI x",
        "LIST /a\r\n",
        "\x16\x01",
        " / HTTP/1.1",
    ] {
        assert_eq!(found(text.as_bytes()), Detected::Opaque, "{text:?}");
    }
    for text in ["", "G", "GET", "GET ", "PRI * HTTP/2.0\r\n\r\nSM", "PROPFIND /a HT", "\r\n", "GET http://a"] {
        assert_eq!(detect(text.as_bytes()), Progress::More, "{text:?}");
    }
}

#[test]
fn nothing_waits_for_ever() {
    assert_eq!(found(&[b'A'; 100]), Detected::Opaque);
    assert_eq!(found(&[b"XYZ /", &[b'a'; 20_000][..]].concat()), Detected::Opaque);
    assert_eq!(found(&[b'\n'; 100]), Detected::Opaque);
    assert_eq!(found(&[0x16, 3, 1, 0, 1, 1].repeat(10_000)), Detected::Opaque);
}

#[test]
fn a_client_hello_says_name_and_protocols() {
    let name = "P80.reviews.demo.outrigger.internal";
    for record in [1, 7, 60, 16_000] {
        let Detected::Tls(hello) = found(&hello(Some(name), &[b"h2", b"http/1.1"], record)) else { panic!("{record}") };
        assert_eq!(hello.sni.as_deref(), Some("p80.reviews.demo.outrigger.internal"));
        assert_eq!(hello.alpn, [&b"h2"[..], b"http/1.1"]);
        assert!(hello.is_mesh());
    }
    let outside = Hello { sni: Some("example.com".into()), alpn: vec![] };
    assert!(!outside.is_mesh());
    assert_eq!(found(&hello(Some("example.com"), &[], 16_000)), Detected::Tls(outside));
    assert_eq!(found(&hello(None, &[], 16_000)), Detected::Tls(Hello::default()));
}

#[test]
fn every_prefix_of_a_hello_wants_more() {
    for record in [50, 16_000] {
        let whole = hello(Some("p80.reviews.demo.outrigger.internal"), &[b"h2"], record);
        for length in 0..whole.len() {
            assert_eq!(detect(&whole[..length]), Progress::More, "{length}");
        }
    }
}

proptest! {
    #[test]
    fn no_bytes_make_it_panic(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
        let _ = detect(&bytes);
        let _ = detect(&[&[0x16, 3, 1][..], &bytes].concat());
    }

    #[test]
    fn no_damage_makes_it_panic_or_wait(place in 0usize..160, byte: u8) {
        let mut bytes = hello(Some("p80.reviews.demo.outrigger.internal"), &[b"h2"], 16_000);
        let place = place % bytes.len();
        bytes[place] = byte;
        // More is bounded: it ends when as many bytes as are ever waited for are there.
        bytes.resize(17 * 1024, 0);
        prop_assert_ne!(detect(&bytes), Progress::More);
    }

    #[test]
    fn a_decision_stays(bytes in "[A-Z]{1,5} [/a-z*]{0,5}( HTTP/1.[01]\r\n)?[a-z]{0,9}", cut in 0usize..30) {
        let bytes = bytes.as_bytes();
        let early = detect(&bytes[..cut.min(bytes.len())]);
        prop_assert!(early == Progress::More || early == detect(bytes));
    }
}
