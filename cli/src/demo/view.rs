//! The live view: what the sidecars' metrics and the load say, once a second.

use std::collections::BTreeMap;
use std::io::IsTerminal;
use std::time::{Duration, Instant};

use ratatui::Frame;
use ratatui::crossterm::event::{self, Event, KeyCode, KeyModifiers};
use ratatui::layout::{Constraint, Layout as Split};
use ratatui::style::{Color, Modifier, Style};
use ratatui::text::Line;
use ratatui::widgets::{Block, Cell, Paragraph, Row, Table};

use super::load::Load;
use super::observe::Scrape;
use super::shop::Shop;

const EVERY: Duration = Duration::from_secs(1);
const WINDOW: Duration = Duration::from_secs(5);
const DURATION: &str = "outrigger_request_duration_seconds";
const REQUESTS: &str = "outrigger_requests_total";

/// One line of the table: a workload's inbound traffic since the last look.
#[derive(Debug)]
struct Workload {
    name: String,
    version: String,
    rate: f64,
    success: Option<f64>,
    p50: Option<f64>,
    p99: Option<f64>,
    peers: String,
    filter_calls: f64,
}

/// All that one look shows.
#[derive(Debug, Default)]
struct Picture {
    workloads: Vec<Workload>,
    /// Share of each version in the answers of the last seconds, percent
    split: BTreeMap<String, f64>,
    requests: usize,
    errors: usize,
    /// Slowest answer but one in a hundred, milliseconds
    p99: Option<f64>,
}

/// Shows the mesh until `q` or Ctrl-C; plain lines where the output is no terminal.
///
/// # Errors
/// When the terminal cannot be used.
pub(super) async fn run(shop: &Shop, load: &Load) -> anyhow::Result<()> {
    let hint = format!("move the canary: edit the weights in {}", shop.layout().route_file().display());
    if !std::io::stdout().is_terminal() {
        super::say(&hint);
        let mut last = BTreeMap::new();
        loop {
            tokio::time::sleep(2 * EVERY).await;
            print(&look(shop, load, &mut last, 2 * EVERY).await);
        }
    }
    let mut terminal = ratatui::init();
    let mut last = BTreeMap::new();
    let mut looked = Instant::now();
    let mut picture = look(shop, load, &mut last, EVERY).await;
    let end = loop {
        if let Err(e) = terminal.draw(|frame| draw(frame, &picture, &hint)) {
            break Err(e.into());
        }
        match tokio::task::spawn_blocking(quit_pressed).await {
            Ok(Ok(true)) => break Ok(()),
            Ok(Ok(false)) => {}
            Ok(Err(e)) => break Err(e.into()),
            Err(e) => break Err(e.into()),
        }
        if looked.elapsed() >= EVERY {
            picture = look(shop, load, &mut last, looked.elapsed()).await;
            looked = Instant::now();
        }
    };
    ratatui::restore();
    end
}

/// Waits a little for a key; in raw mode Ctrl-C is one.
fn quit_pressed() -> std::io::Result<bool> {
    if !event::poll(Duration::from_millis(200))? {
        return Ok(false);
    }
    Ok(matches!(event::read()?, Event::Key(key) if key.code == KeyCode::Char('q')
        || (key.code == KeyCode::Char('c') && key.modifiers.contains(KeyModifiers::CONTROL))))
}

async fn look(shop: &Shop, load: &Load, last: &mut BTreeMap<&'static str, Scrape>, over: Duration) -> Picture {
    let mut picture = Picture::default();
    for (workload, scrape) in shop.scrapes().await {
        let before = last.insert(workload.name, scrape.clone()).unwrap_or_default();
        let inbound = [("direction", "inbound")];
        let since = |labels: &[(&str, &str)]| scrape.sum(REQUESTS, labels) - before.sum(REQUESTS, labels);
        let all = since(&inbound);
        let failed: f64 = scrape
            .of_name(REQUESTS, &inbound)
            .filter(|sample| sample.label("code").starts_with('5'))
            .map(|sample| sample.value)
            .sum::<f64>()
            - before
                .of_name(REQUESTS, &inbound)
                .filter(|old| old.label("code").starts_with('5'))
                .map(|old| old.value)
                .sum::<f64>();
        picture.workloads.push(Workload {
            name: workload.service.into(),
            version: workload.version.into(),
            rate: all / over.as_secs_f64(),
            success: (all > 0.0).then(|| 100.0 * (all - failed) / all),
            p50: scrape.quantile(&before, DURATION, &inbound, 0.5),
            p99: scrape.quantile(&before, DURATION, &inbound, 0.99),
            peers: peers(&scrape),
            filter_calls: scrape.sum("outrigger_filter_calls_total", &[])
                - before.sum("outrigger_filter_calls_total", &[]),
        });
    }
    let recent = load.since(Instant::now().checked_sub(WINDOW).unwrap_or_else(Instant::now));
    picture.requests = recent.len();
    picture.errors = recent.iter().filter(|outcome| outcome.error.is_some()).count();
    let mut latencies: Vec<Duration> = recent.iter().map(|outcome| outcome.latency).collect();
    latencies.sort_unstable();
    picture.p99 = latencies.get(latencies.len() * 99 / 100).map(|latency| latency.as_secs_f64() * 1e3);
    let mut counts: BTreeMap<String, f64> = BTreeMap::new();
    for version in recent.iter().filter_map(|outcome| outcome.version.clone()) {
        *counts.entry(version).or_default() += 1.0;
    }
    let total: f64 = counts.values().sum();
    front_door(&mut picture, &latencies);
    picture.split = counts.into_iter().map(|(version, count)| (version, 100.0 * count / total.max(1.0))).collect();
    picture
}

/// The load asks web's application itself, as a browser would, so its sidecar receives nothing: its line is what the client saw.
#[allow(clippy::cast_precision_loss)] // thousands at most
fn front_door(picture: &mut Picture, latencies: &[Duration]) {
    let at = |share: usize| latencies.get(latencies.len() * share / 100).map(Duration::as_secs_f64);
    let (requests, errors) = (picture.requests as f64, picture.errors as f64);
    let rate = rate(picture);
    if let Some(web) = picture.workloads.iter_mut().find(|of| of.name == "web") {
        web.rate = rate;
        web.success = (requests > 0.0).then(|| 100.0 * (requests - errors) / requests);
        (web.p50, web.p99) = (at(50), at(99));
        web.peers = "(client)".into();
    }
}

/// Accounts that proved themselves to this sidecar.
fn peers(scrape: &Scrape) -> String {
    let mut names: Vec<&str> = scrape
        .of_name("outrigger_tls_connections_total", &[("direction", "inbound")])
        .filter_map(|sample| sample.label("peer").rsplit('/').next())
        .filter(|name| !name.is_empty())
        .collect();
    names.dedup();
    names.join(", ")
}

fn draw(frame: &mut Frame<'_>, picture: &Picture, hint: &str) {
    let rows = u16::try_from(picture.workloads.len()).unwrap_or(8);
    let [title, table, split, foot] = Split::vertical([
        Constraint::Length(2),
        Constraint::Length(rows + 3),
        Constraint::Length(5),
        Constraint::Min(3),
    ])
    .areas(frame.area());
    let bold = Style::new().add_modifier(Modifier::BOLD);
    frame.render_widget(
        Paragraph::new(Line::styled(
            format!(
                "Outrigger demo   client: {:.0} requests/s, {} errors in the last 5 s",
                rate(picture),
                picture.errors
            ),
            bold,
        )),
        title,
    );
    let header = ["service", "version", "req/s", "success", "p50", "p99", "mTLS peers", "filter calls"];
    let lines = picture.workloads.iter().map(|of| {
        let healthy = of.success.is_none_or(|success| success > 99.0);
        Row::new(cells(of).map(Cell::from)).style(Style::new().fg(if healthy { Color::Reset } else { Color::Red }))
    });
    let widths = [12, 8, 8, 9, 10, 10, 14, 13].map(Constraint::Length);
    frame.render_widget(Table::new(lines, widths).header(Row::new(header).style(bold)).block(Block::bordered()), table);
    let bars: Vec<Line<'_>> = picture.split.iter().map(|(version, share)| Line::raw(bar(version, *share))).collect();
    frame.render_widget(
        Paragraph::new(bars).block(Block::bordered().title(" reviews: answers by version, last 5 s ")),
        split,
    );
    frame.render_widget(Paragraph::new(vec![Line::raw(hint), Line::raw("q or Ctrl-C: stop everything")]), foot);
}

#[allow(clippy::cast_precision_loss)] // thousands at most
fn rate(picture: &Picture) -> f64 {
    picture.requests as f64 / WINDOW.as_secs_f64()
}

fn cells(of: &Workload) -> [String; 8] {
    let time = |seconds: Option<f64>| seconds.map_or("-".into(), |s| format!("≤ {:.1} ms", s * 1e3));
    [
        of.name.clone(),
        of.version.clone(),
        format!("{:.1}", of.rate),
        of.success.map_or("-".into(), |success| format!("{success:.1} %")),
        time(of.p50),
        time(of.p99),
        of.peers.clone(),
        format!("{:.0}", of.filter_calls),
    ]
}

#[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // 0 to 40
fn bar(version: &str, share: f64) -> String {
    format!("{version}  {:<40}  {share:.0} %", "█".repeat((share * 0.4).round() as usize))
}

#[allow(clippy::print_stdout)]
fn print(picture: &Picture) {
    println!();
    let header =
        ["service", "version", "req/s", "success", "p50", "p99", "mTLS peers", "filter calls"].map(str::to_owned);
    for row in std::iter::once(header).chain(picture.workloads.iter().map(cells)) {
        let [service, version, rate, success, p50, p99, peers, filter] = row;
        println!("{service:<10} {version:<8} {rate:>7} {success:>9} {p50:>11} {p99:>11}  {peers:<12} {filter:>12}");
    }
    for (version, share) in &picture.split {
        println!("reviews {}", bar(version, *share));
    }
}
